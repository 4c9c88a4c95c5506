"""The comparison of two paths, stage by stage."""

import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from idefics2_engine.errors import ConfigError
from idefics2_engine.llm_options import model_folder
from idefics2_engine.parity import stages
from idefics2_engine.parity.dump import Recording, check_new, write_digest
from idefics2_engine.parity.inputs import Case, default_cases
from idefics2_engine.parity.logits import LogitsMeasure, Parting, find_partings, measure_logits
from idefics2_engine.parity.measure import Legs, StageMeasure, measure_answers, measure_stage
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.record import record, record_reference
from idefics2_engine.parity.row_differences import RowDifferences
from idefics2_engine.parity.transformers_stages import check_installed
from idefics2_engine.parity.verdict import RATIO, Verdict, error_ratios, judge
from idefics2_engine.parity.worst_cases import WorstCase, worst_cases
from idefics2_kernels import Ops


@dataclass(frozen=True)
class StageResult:
    """What was found at a stage.

    Attributes:
        stage: Its name.
        verdict: How A and B compare.
        measure: The figures.
        ratios: Errors of A and B against float64, as multiples of their yardstick's. ``None``
            without a float64 leg, and for stages without rounding.
    """

    stage: str
    verdict: Verdict
    measure: StageMeasure
    ratios: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    Attributes:
        a: Path, dtype, model and versions of A.
        b: The same of B.
        num_cases: Number of inputs.
        is_judged: Whether there was a float64 leg.
        stages: A result for each stage, in order.
        logits: How the logits differ. ``None`` if one side is a digest.
        partings: Where answers part.
        worst_cases: The differences of every row, of the worst cases. None if one side is a digest.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    num_cases: int
    is_judged: bool
    stages: list[StageResult]
    logits: LogitsMeasure | None
    partings: list[Parting]
    worst_cases: list[WorstCase]

    @property
    def first_difference(self) -> StageResult | None:
        """The first stage whose difference is beyond rounding, if any."""
        return next((one for one in self.stages if one.verdict is Verdict.DIFFERS), None)

    @property
    def within_rounding(self) -> bool:
        """Whether every stage has the same bits or differs within rounding."""
        passed = (Verdict.SAME_BITS, Verdict.WITHIN_ROUNDING)
        return all(one.verdict in passed for one in self.stages)

    @property
    def same_bits(self) -> bool:
        """Whether every stage has the same bits."""
        return all(one.verdict is Verdict.SAME_BITS for one in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data. Infinite figures are ``None``."""
        first = self.first_difference
        return {
            "a": self.a,
            "b": self.b,
            "cases": self.num_cases,
            "judged": self.is_judged,
            "first_difference": None if first is None else first.stage,
            "within_rounding": self.within_rounding,
            "same_bits": self.same_bits,
            "stages": [
                _finite(
                    {
                        "verdict": str(one.verdict),
                        "ratio_a": None if one.ratios is None else one.ratios[0],
                        "ratio_b": None if one.ratios is None else one.ratios[1],
                        **asdict(one.measure),
                    }
                )
                for one in self.stages
            ],
            "logits": None if self.logits is None else _finite(asdict(self.logits)),
            "partings": [_finite(asdict(one)) for one in self.partings],
        }


def compare(
    a: str | Path,
    b: str | Path,
    *,
    model: str | pathlib.Path | None = None,
    cases: Sequence[Case] | None = None,
    device: str = "auto",
    max_tokens: int = 16,
    float64: bool = True,
    ratio: float = RATIO,
    ops: Ops | None = None,
    save: pathlib.Path | None = None,
    digest: bool = False,
) -> Comparison:
    """Run two paths on the same inputs and compare them stage by stage.

    Args:
        a: A path, such as ``"ours:triton:bf16"``, or the folder of a recording.
        b: The path to compare it with.
        model: A checkpoint as ``LLM`` takes it. If ``None``, the demo checkpoint.
        cases: Inputs. If ``None``, twelve questions about the demo's pictures.
        device: Where to compute, as ``LLM`` takes it.
        max_tokens: Most tokens of an answer.
        float64: Whether to run the float64 leg, without which rounding cannot be judged.
        ratio: Ratio of the errors of A and B against float64 that is still rounding.
        ops: Operations of A in place of those that its path names.
        save: New folder for the recording of A.
        digest: Whether ``save`` keeps only digests of the tensors.

    Raises:
        Idefics2Error: A path, the model, an input or an option is invalid, or the inputs are not
            those of a recording.
    """
    paths = Path.parse(a), Path.parse(b)
    kinds = [path.kind for path in paths]
    if kinds == ["float64", "float64"]:
        raise ConfigError("one of the paths must not be float64, got float64 twice")
    if ops is not None and kinds[0] != "ours":
        raise ConfigError(f"ops must come with a path of ours as A, got {paths[0]}")
    if save is not None and kinds[0] not in ("ours", "transformers"):
        raise ConfigError(f"a path must be ours or transformers to be saved, got {paths[0]}")
    # What would fail late is looked at before anything is computed
    if save is not None:
        check_new(save)
    if "transformers" in kinds:
        check_installed()
    folder = model_folder(model, None)
    inputs = default_cases() if cases is None else list(cases)
    if not inputs:
        raise ConfigError("cases must be at least one, got none")
    with TemporaryDirectory(prefix="idefics2-parity-") as temporary:
        scratch = pathlib.Path(temporary)
        found: dict[str, Recording] = {}
        for name, path in zip("ab", paths, strict=True):
            if path.folder is not None:
                found[name] = Recording.load(path.folder)
            elif path.kind != "float64":
                found[name] = record(
                    path,
                    scratch / name if save is None or digest or name == "b" else save,
                    inputs,
                    folder,
                    device=device,
                    max_tokens=max_tokens,
                    ops=ops if name == "a" else None,
                )
        if save is not None and digest:
            write_digest(found["a"], save)
        # One of the paths is not float64
        first = found.get("a") or found["b"]
        needs_exact = float64 or "float64" in kinds
        exact = None
        if needs_exact:
            exact = record_reference(first, scratch / "float64", inputs, folder, device=device)
        a_leg, b_leg = (found.get(name, exact) for name in "ab")
        assert a_leg is not None
        assert b_leg is not None
        legs = Legs(a_leg, b_leg, exact)
        _check_alike(legs)
        _check_inputs(legs)
        legs = _with_yardstick(legs, inputs, folder, scratch, device)
        return _compare(legs, ratio)


def _with_yardstick(
    legs: Legs,
    inputs: Sequence[Case],
    folder: pathlib.Path,
    scratch: pathlib.Path,
    device: str,
) -> Legs:
    """Return ``legs`` with what two sides of different dtypes are compared with."""
    a, b, exact = legs.a, legs.b, legs.exact
    if exact is None or (a.dtype, a.nf4) == (b.dtype, b.nf4):
        return legs
    narrow = max((leg for leg in (a, b) if leg is not exact), key=lambda leg: _eps(leg.dtype))
    if exact in (a, b) and _is_reference(narrow):
        # The reference cannot be its own yardstick
        return Legs(a, b)
    yardstick = record_reference(
        narrow, scratch / "yardstick", inputs, folder, device=device, in_float64=False
    )
    return Legs(a, b, exact, yardstick)


def _is_reference(recording: Recording) -> bool:
    kind, *parts = recording.path.split(":")
    is_default = not {"triton", "reference", "deterministic"}.intersection(parts)
    return kind == "ours" and (
        "reference" in parts or (is_default and recording.about["device"] == "cpu")
    )


def _compare(legs: Legs, ratio: float) -> Comparison:
    eps = max(_eps(leg.dtype) for leg in (legs.a, legs.b) if leg.dtype != "float64")
    logits, partings = measure_logits(legs), find_partings(legs)
    parted = [parting.case for parting in partings]
    differences = RowDifferences()
    results = []
    for stage in legs.a.order:
        if stage in (stages.TOKENS, stages.TEXT):
            measure = measure_answers(legs, stage, parted)
        else:
            measure = measure_stage(legs, stage, differences)
        verdict = judge(measure, eps, partings, ratio)
        ratios = None if measure.note is not None else error_ratios(measure, eps)
        results.append(StageResult(stage, verdict, measure, ratios))
    differing = [one.measure for one in results if one.verdict is Verdict.DIFFERS]
    return Comparison(
        _description(legs.a),
        _description(legs.b),
        len(legs.a.cases),
        legs.exact is not None,
        results,
        logits,
        partings,
        worst_cases(legs, differences, differing, partings),
    )


def _description(recording: Recording) -> dict[str, Any]:
    return {
        "path": recording.path,
        "dtype": recording.dtype,
        "nf4": recording.nf4,
        "digest": recording.is_digest,
        **recording.about,
    }


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _check_alike(legs: Legs) -> None:
    """Raise ``ConfigError`` unless A and B are recordings of one model and as many inputs."""
    if legs.a.order != legs.b.order:
        raise ConfigError("the paths must have the same stages, got those of different models")
    if len(legs.a.cases) != len(legs.b.cases):
        raise ConfigError(
            f"the paths must have the same inputs, got {len(legs.a.cases)} and {len(legs.b.cases)}"
        )


def _check_inputs(legs: Legs) -> None:
    """Raise ``ConfigError`` unless the float64 leg has the inputs of A or of B.

    A path may prepare its inputs wrongly, but not both in the same way. With other inputs, the
    errors of both sides would be large and their ratio would say nothing.
    """
    exact = legs.exact
    if exact is None:
        return
    for case in range(len(exact.cases)):
        for stage in (stages.DECODE, stages.TILES, stages.TOKEN_IDS):
            wanted = [leg.hashes[case].get(stage) for leg in (legs.a, legs.b)]
            if exact.hashes[case].get(stage) not in wanted:
                raise ConfigError(
                    f"case {case}: the inputs must be those of the recordings, got another {stage}"
                )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    infinite = (float("inf"), float("-inf"))
    return {
        name: None if isinstance(value, float) and (value in infinite or value != value) else value
        for name, value in values.items()
    }
