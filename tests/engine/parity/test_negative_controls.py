"""A wrong computation is found, and named at its stage; a right one is within rounding."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.images import tiling
from idefics2_engine.model import text
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.search.bisection import Bisection, Explanation
from idefics2_kernels import REFERENCE
from parity_recordings import compare_on_cpu, first_stage, record_path


def test_right_paths_are_within_rounding(ours: Path, theirs: Path) -> None:
    comparison = compare_on_cpu(ours, theirs)
    assert comparison.within_rounding
    assert not comparison.same_bits
    verdicts = {one.stage: one.verdict for one in comparison.stages}
    for stage in ("decode", "tiles", "token ids", "tokens", "text"):
        assert verdicts[stage] is Verdict.SAME_BITS
    assert comparison.logits is not None
    assert comparison.logits.top1_agreement == 1.0


def test_same_path_twice_has_the_same_bits(ours: Path) -> None:
    comparison = compare_on_cpu("ours:reference", ours)
    assert comparison.same_bits
    assert {one.verdict for one in comparison.stages} == {Verdict.SAME_BITS}


def gelu_by_erf(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.gelu(REFERENCE.linear(x, weight, bias))


def rotary_of_wrong_position(*args: Any) -> Tensor:
    changed = list(args)
    changed[3] = args[3].clone()
    if len(changed[3]) > 1:
        changed[3][len(changed[3]) // 2] += 1
    return REFERENCE.rotary_and_cache(*changed)


def perceiver_of_other_scale(*args: Any, **kwargs: Any) -> Tensor:
    return REFERENCE.perceiver_attention(*args, **{**kwargs, "scale": 0.11})


def window_of_80(*args: Any, **kwargs: Any) -> Tensor:
    return REFERENCE.paged_attention(*args, **{**kwargs, "window": 80})


def patches_of_other_mean(*args: Any) -> Tensor:
    changed = list(args)
    changed[5] = (0.501, *args[5][1:])
    return REFERENCE.patches(*changed)


def gate_and_up_swapped(gate_up: Tensor) -> Tensor:
    return REFERENCE.silu_mul(torch.cat(gate_up.chunk(2, -1)[::-1], -1))


MUTATED: dict[str, tuple[str, Any, str]] = {
    "mean of pixels": ("patches", patches_of_other_mean, "patch embedding"),
    "GELU": ("linear_gelu", gelu_by_erf, "vision layer 0"),
    "gate for up": ("silu_mul", gate_and_up_swapped, "projection"),
    "scale": ("perceiver_attention", perceiver_of_other_scale, "perceiver layer 0"),
    "wrong position id": ("rotary_and_cache", rotary_of_wrong_position, "text layer 0"),
    "window": ("paged_attention", window_of_80, "text layer 0"),
}


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_operation_is_named(name: str, theirs: Path) -> None:
    operation, wrong, stage = MUTATED[name]
    ops = replace(REFERENCE, **{operation: wrong})
    comparison = compare_on_cpu("ours:reference", theirs, ops=ops, bisect=True)
    assert first_stage(comparison) == stage
    assert comparison.bisection is not None
    assert comparison.bisection.explanations == (Explanation(stage, (operation,)),)


def swapped_boxes(width: int, height: int) -> list[tiling.Box]:
    first, second, *rest = SPLIT(width, height)
    return [second, first, *rest]


def wrong_positions(tile: tiling.Tile) -> Any:
    ids = np.array(POSITIONS(tile))
    ids[[3, 4]] = ids[[4, 3]]
    return ids


def rounded_table(config: Any) -> Tensor:
    return TABLE(config).bfloat16().float()


SPLIT, POSITIONS, TABLE = tiling.split_boxes, tiling.Tile.position_ids, text.rotary_table
PATCHED: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "swapped sub-images": (tiling, "split_boxes", swapped_boxes, "tiles"),
    "position ids of patches": (tiling.Tile, "position_ids", wrong_positions, "patch embedding"),
    "rounded rotary table": (text, "rotary_table", rounded_table, "text layer 0"),
}


@pytest.mark.parametrize("name", PATCHED)
def test_wrong_input_is_named(
    name: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, attribute, wrong, stage = PATCHED[name]
    with monkeypatch.context() as patch:
        patch.setattr(home, attribute, wrong)
        record_path("ours:reference", tmp_path / "a")
    comparison = compare_on_cpu(tmp_path / "a", theirs)
    assert first_stage(comparison) == stage
    first = comparison.first_difference
    assert first is not None
    if name == "swapped sub-images":
        assert first.measure.place["part"] in ("top left", "top right")
    if name == "position ids of patches":
        assert first.measure.place["patch"] in ([0, 3], [0, 4])


def other_file(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a checkpoint with the demo's files, of which one has other values."""
    folder.mkdir()
    for file in DEMO_MODEL.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    values = json.loads((DEMO_MODEL / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    return folder


def other_config(folder: Path, part: str, **changes: float) -> Path:
    return other_file(folder, "config.json", lambda config: config[part].update(changes))


EPS = {
    "vision": ("vision_config", {"layer_norm_eps": 1e-4}, "vision layer 0"),
    "perceiver": ("perceiver_config", {"rms_norm_eps": 1e-4}, "perceiver layer 0"),
    "text": ("text_config", {"rms_norm_eps": 1e-4}, "text layer 0"),
}


@pytest.mark.parametrize("name", EPS)
def test_changed_eps_is_named(name: str, theirs: Path, tmp_path: Path) -> None:
    part, changes, stage = EPS[name]
    record_path("ours:reference", tmp_path / "a", other_config(tmp_path / "other", part, **changes))
    assert first_stage(compare_on_cpu(tmp_path / "a", theirs)) == stage


def test_changed_eps_is_not_the_fault_of_an_operation(theirs: Path, tmp_path: Path) -> None:
    part, changes, stage = EPS["vision"]
    model = other_config(tmp_path / "other", part, **changes)
    comparison = compare_on_cpu("ours:deterministic", theirs, model=model, bisect=True)
    assert comparison.bisection == Bisection((Explanation(stage, ()),), 1)


def test_other_choice_of_tokens_is_named(ours: Path, theirs: Path, tmp_path: Path) -> None:
    best = Recording.load(ours).cases[0].answer_ids[0]
    model = other_file(
        tmp_path / "other",
        "generation_config.json",
        lambda values: values["bad_words_ids"].append([best]),
    )
    record_path("ours:reference", tmp_path / "a", model)
    comparison = compare_on_cpu(tmp_path / "a", theirs)
    assert first_stage(comparison) == "tokens"
    parting = comparison.partings[0]
    assert (parting.case, parting.index, parting.tokens[1]) == (0, 0, best)
    assert not parting.is_near_tie


def test_wrong_yardstick_is_named(ours: Path, theirs: Path, tmp_path: Path) -> None:
    """A wrong B is found as well, although the criterion bounds A alone."""
    model = other_config(tmp_path / "other", "text_config", rms_norm_eps=1e-4)
    record_path("transformers", tmp_path / "b", model)
    assert first_stage(compare_on_cpu(ours, tmp_path / "b")) == "text layer 0"
