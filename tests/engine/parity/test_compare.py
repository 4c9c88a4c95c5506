"""The comparison of paths of other dtypes and implementations, and its default inputs."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.errors import ConfigError
from idefics2_engine.model.batch import TextBatch
from idefics2_engine.parity.inputs import Case, Processors, default_cases
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.recording.our_stages import our_taps
from idefics2_engine.parity.recording.recorder import Recorder
from idefics2_engine.parity.stages import stage_order
from idefics2_kernels import REFERENCE
from parity_recordings import CASES, compare_on_cpu

TEXT = [Case.raw("The picture shows")]


def test_default_cases_reach_every_branch() -> None:
    cases = default_cases()
    assert len(cases) == 12
    processors = Processors(DEMO_MODEL)
    prompts = [case.process(processors.of(case)) for case in cases]
    splits = {case.split for case in cases if case.images}
    assert splits == {None, True, False}
    assert {len(case.images) for case in cases} == {0, 1, 2, 3}
    window = processors.config.text.sliding_window
    assert window is not None
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) <= 2 < window < max(lengths)
    sizes = {tile.pixels.shape[:2] for prompt in prompts for tile in prompt.tiles}
    assert any(side % 14 for size in sizes for side in size)
    assert len({case.turns is None for case in cases}) == 2


def test_default_cases_are_within_rounding_of_transformers() -> None:
    pytest.importorskip("transformers")
    comparison = compare_on_cpu("ours:reference", "transformers", cases=None)
    assert comparison.num_cases == 12
    assert comparison.within_rounding
    assert comparison.first_difference is None


def test_both_sides_of_a_model_have_all_stages(ours: Path, theirs: Path) -> None:
    a, b = Recording.load(ours), Recording.load(theirs)
    assert a.order == b.order == stage_order(Processors(DEMO_MODEL).config)
    assert [set(stages) for stages in a.hashes] == [set(stages) for stages in b.hashes]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("ours:reference", "ours:deterministic"),
        ("ours:reference:bf16", "transformers:eager:bf16"),
        # Both are compared with the reference in the narrower dtype
        ("ours:deterministic:bf16", "ours:reference"),
        ("ours:reference:nf4", "ours:deterministic:fp16:nf4"),
    ],
)
def test_implementations_and_dtypes_are_within_rounding(a: str, b: str) -> None:
    comparison = compare_on_cpu(a, b, cases=TEXT)
    assert comparison.within_rounding
    assert not comparison.same_bits


def test_quantization_is_not_rounding() -> None:
    comparison = compare_on_cpu("ours:nf4", "ours", cases=TEXT)
    assert comparison.first_difference is not None
    assert comparison.first_difference.stage == "text layer 0"


def test_float64_is_a_path() -> None:
    judged = compare_on_cpu("ours:deterministic", "float64", cases=TEXT)
    assert judged.within_rounding
    # The reference cannot be its own yardstick
    alone = compare_on_cpu("float64", "ours:reference", cases=TEXT)
    verdicts = {one.stage: one.verdict for one in alone.stages}
    assert verdicts["logits"] is Verdict.NOT_JUDGED
    assert 0 < alone.stages[-3].measure.largest < 1e-5


def test_without_float64_rounding_is_not_judged() -> None:
    comparison = compare_on_cpu("ours:reference", "ours:deterministic", cases=TEXT, float64=False)
    assert not comparison.within_rounding
    assert comparison.first_difference is None
    assert {one.verdict for one in comparison.stages} == {Verdict.SAME_BITS, Verdict.NOT_JUDGED}


def test_operations_of_a_are_replaced(ours: Path) -> None:
    calls = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        return REFERENCE.linear(x, weight, bias)

    assert compare_on_cpu("ours", ours, ops=replace(REFERENCE, linear=counted)).same_bits
    assert calls


def test_recording_changes_nothing_in_the_model() -> None:
    model = load_checkpoint(DEMO_MODEL)
    batch = TextBatch.from_ids([[1, 5, 7]])
    with torch.inference_mode():
        before = model(batch)
        recorder = Recorder(our_taps(model))
        with recorder.recording() as stages:
            during = model(batch)
        assert torch.equal(before, during)
        seen = {name: len(found) for name, found in stages.items()}
        model(batch)
    assert seen == {name: len(found) for name, found in stages.items()}
    assert seen["text norm"] == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_transformers_is_imported_only_for_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert compare_on_cpu("ours", "ours:reference", cases=TEXT).same_bits
    with pytest.raises(ConfigError, match="path transformers must have its package"):
        compare_on_cpu("ours", "transformers", cases=TEXT)


def test_wrong_arguments_are_refused(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not be float64, got float64 twice"):
        compare_on_cpu("float64", "float64")
    with pytest.raises(ConfigError, match="ops must come with a path of ours as A"):
        compare_on_cpu(ours, "ours", ops=REFERENCE)
    with pytest.raises(ConfigError, match="must be ours or transformers to be saved"):
        compare_on_cpu(ours, "ours", save=tmp_path / "a")
    with pytest.raises(ConfigError, match="must be a new folder or an empty one"):
        compare_on_cpu("ours", ours, save=ours, digest=True)
    with pytest.raises(ConfigError, match="cases must be at least one"):
        compare_on_cpu("ours", "ours", cases=CASES[:0])


def test_fp32_is_fp32_while_a_path_runs() -> None:
    """cuDNN's default would round the convolution of transformers to TF32."""
    during = set()

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        during.add(torch.backends.cudnn.allow_tf32)
        return REFERENCE.linear(x, weight, bias)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        ops = replace(REFERENCE, linear=watched)
        compare_on_cpu("ours", "ours", cases=TEXT, ops=ops, float64=False)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert during == {False}


@pytest.mark.long
def test_kernels_are_within_rounding(device: torch.device) -> None:
    """The interpreter takes 15 s for two tokens."""
    paths = "ours:triton:fp32", "ours:reference:fp32"
    comparison = compare_on_cpu(*paths, cases=[Case.raw("a")], device=device.type)
    assert comparison.within_rounding
    assert not comparison.same_bits


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="must run on a CUDA device, or with TRITON_INTERPRET=1"):
        compare_on_cpu("ours:triton", "ours", cases=TEXT)
