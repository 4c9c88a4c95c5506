"""Stages inside layers are the same tensors in all implementations, and name what is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import ConfigError
from idefics2_engine.parity import stages
from idefics2_engine.parity.inner_stages import inner_stages, stages_of
from idefics2_engine.parity.inputs import Processors
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.recording.dump import Recording
from idefics2_kernels import REFERENCE
from parity_recordings import CASES, compare_on_cpu, first_stage, record_path

ORDER = stages_of(DEMO_MODEL, ["all"])


@pytest.fixture(scope="module")
def inside_theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record transformers in fp32, with the stages inside layers."""
    pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("parity") / "theirs"
    record_path("transformers", folder, order=ORDER)
    return folder


def test_stages_inside_a_layer_are_in_order() -> None:
    base = stages_of(DEMO_MODEL)
    assert base == stages.stage_order(Processors(DEMO_MODEL).config)
    layers = [stage for stage in base if stages.is_layer(stage)]
    assert len(layers) == 10
    assert [stage for stage in ORDER if not stages.is_inside(stage)] == base
    assert not any(stages.is_inside(stage) for stage in base)
    own = stages_of(DEMO_MODEL, ["text layer 2"])
    at = own.index("text layer 1") + 1
    assert own[at : own.index("text layer 2")] == inner_stages("text layer 2")
    assert set(ORDER) - set(base) == {stage for layer in layers for stage in inner_stages(layer)}


def test_both_implementations_have_every_inner_stage(inside_theirs: Path) -> None:
    result = compare_on_cpu("ours:reference", inside_theirs, inside=["all"])
    assert [one.stage for one in result.stages] == ORDER
    assert result.within_rounding
    # The latents are parameters, so nothing is rounded before they are projected
    same = {one.stage for one in result.stages if one.verdict is Verdict.SAME_BITS}
    assert "perceiver layer 0 norm" in same
    compared = {one.stage: one.measure for one in result.stages}
    for stage in ORDER:
        if stages.is_inside(stage):
            layer = stage[: stage.index(" layer ") + len(" layer 0")]
            unit = {"latent": "perceiver norm", "patch": "projection"}.get(stages.unit(stage))
            assert compared[stage].num_rows == compared[unit or layer].num_rows > 0


def test_rows_of_inner_stages_are_patches_latents_and_tokens() -> None:
    units = {stage: stages.unit(stage) for stage in ORDER if stages.is_inside(stage)}
    assert units["vision layer 3 queries"] == "patch"
    assert units["perceiver layer 1 patches keys"] == "patch"
    assert units["perceiver layer 1 keys"] == "latent"
    assert units["text layer 0 projection"] == "token"


def vision_scale(*args: Any, **kwargs: Any) -> Tensor:
    return REFERENCE.flash_attention(*args, **{**kwargs, "scale": 0.11})


def perceiver_scale(*args: Any, **kwargs: Any) -> Tensor:
    return REFERENCE.perceiver_attention(*args, **{**kwargs, "scale": 0.11})


def rotary_of_wrong_position(*args: Any) -> Tensor:
    changed = list(args)
    changed[3] = args[3] + (torch.arange(len(args[3])) == len(args[3]) // 2)
    return REFERENCE.rotary_and_cache(*changed)


def norm_of_other_eps(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    return REFERENCE.add_rms_norm(x, residual, weight, 100 * eps)


def rounded_keys(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Round what the keys of patches are to bf16; nothing else has their shape in the demo."""
    out = REFERENCE.linear(x, weight, bias)
    if out.shape[-1] == 192 and out.ndim == 2:
        out[:, :96] = out[:, :96].bfloat16()
    return out


WRONG: dict[str, tuple[str, Any, str]] = {
    "scale of vision": ("flash_attention", vision_scale, "vision layer 0 attention"),
    "rounded keys": ("linear", rounded_keys, "perceiver layer 0 patches keys"),
    "scale of latents": ("perceiver_attention", perceiver_scale, "perceiver layer 0 attention"),
    "eps": ("add_rms_norm", norm_of_other_eps, "perceiver layer 0 mlp norm"),
    "position": ("rotary_and_cache", rotary_of_wrong_position, "text layer 0 attention"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operation_is_named_inside_its_layer(name: str, inside_theirs: Path) -> None:
    operation, wrong, stage = WRONG[name]
    layer = stage[: stage.index(" layer ") + len(" layer 0")]
    ops = replace(REFERENCE, **{operation: wrong})
    result = compare_on_cpu("ours", inside_theirs, ops=ops, inside=[layer])
    assert first_stage(result) == stage


def test_recordings_are_compared_at_the_stages_that_both_have(
    ours: Path, inside_theirs: Path, tmp_path: Path
) -> None:
    layer = "perceiver layer 1"
    record_path("ours:reference", tmp_path / "a", order=stages_of(DEMO_MODEL, [layer]))
    assert Recording.load(tmp_path / "a").order == stages_of(DEMO_MODEL, [layer])
    both = compare_on_cpu(tmp_path / "a", inside_theirs)
    assert [one.stage for one in both.stages] == stages_of(DEMO_MODEL, [layer])
    assert both.within_rounding
    # The float64 leg has these stages as well
    judged = {one.stage: one.measure for one in both.stages}
    assert judged[f"{layer} attention"].error_a
    assert [one.stage for one in compare_on_cpu(ours, tmp_path / "a").stages] == stages_of(
        DEMO_MODEL
    )


def test_wrong_layers_are_refused(ours: Path) -> None:
    ranges = "vision layer 0 to 3, perceiver layer 0 to 1, text layer 0 to 3, got 'text layer 4'"
    with pytest.raises(ConfigError, match=f"must be all or one from {ranges}"):
        compare_on_cpu("ours", ours, inside=["text layer 4"])
    with pytest.raises(ConfigError, match="has no stage text layer 1 norm: record it with"):
        compare_on_cpu("ours", ours, inside=["text layer 1"], cases=CASES)
