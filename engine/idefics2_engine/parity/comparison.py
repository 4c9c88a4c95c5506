"""The comparison of two paths, stage by stage."""

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_engine.errors import ConfigError
from idefics2_engine.llm_options import model_folder
from idefics2_engine.parity import stages
from idefics2_engine.parity.inner_stages import stages_of
from idefics2_engine.parity.inputs import Case, default_cases
from idefics2_engine.parity.measures.alike import check_alike, check_inputs
from idefics2_engine.parity.measures.logits import (
    find_partings,
    measure_logits,
)
from idefics2_engine.parity.measures.measure import (
    Legs,
    measure_answers,
    measure_stage,
)
from idefics2_engine.parity.measures.row_differences import RowDifferences
from idefics2_engine.parity.measures.verdict import RATIO, Verdict, error_ratios, judge
from idefics2_engine.parity.measures.worst_cases import worst_cases
from idefics2_engine.parity.measures.yardstick import epsilon, with_yardstick
from idefics2_engine.parity.operations import CalledOperations, check_swap
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.dump import Recording, check_new, write_digest
from idefics2_engine.parity.recording.record import record, record_reference
from idefics2_engine.parity.recording.transformers_stages import check_installed
from idefics2_engine.parity.result import Comparison, StageResult
from idefics2_engine.parity.search.trials import explain
from idefics2_kernels import Ops


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
    swap: Sequence[str] = (),
    bisect: bool = False,
    inside: Sequence[str] = (),
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
        swap: Operations of A that are replaced by the reference's, such as ``"rms_norm"``.
        bisect: Whether to find the operations of A that explain the differences.
        inside: Layers whose inner stages are compared, such as ``"text layer 2"``, or ``"all"``.
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
    for name, given in (("ops", ops), ("bisect", bisect)):
        if given and kinds[0] != "ours":
            raise ConfigError(f"{name} must come with a path of ours as A, got {paths[0]}")
    check_swap(paths[0], swap)
    needs_exact = float64 or "float64" in kinds
    if bisect and not needs_exact:
        raise ConfigError("bisect must come with the float64 leg, got none")
    if save is not None and kinds[0] not in ("ours", "transformers"):
        raise ConfigError(f"a path must be ours or transformers to be saved, got {paths[0]}")
    # What would fail late is looked at before anything is computed
    if save is not None:
        check_new(save)
    if "transformers" in kinds:
        check_installed()
    folder = model_folder(model, None)
    order = stages_of(folder, inside)
    called = CalledOperations() if bisect else None
    of_a: dict[str, Any] = {"ops": ops, "swap": swap, "called": called}
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
                    order=order,
                    label=f"{name.upper()} {path}",
                    **(of_a if name == "a" else {}),
                )
        if save is not None and digest:
            write_digest(found["a"], save)
        # One of the paths is not float64. With B's answers, the float64 leg serves A with other
        # operations as well, which may give other answers.
        weights, answers = found.get("a") or found["b"], found.get("b") or found["a"]
        exact = None
        if needs_exact:
            exact = record_reference(
                weights, scratch / "float64", inputs, answers, folder, device=device
            )
        a_leg, b_leg = (found.get(name, exact) for name in "ab")
        assert a_leg is not None
        assert b_leg is not None
        legs = Legs(a_leg, b_leg, exact)
        check_alike(legs, order)
        check_inputs(legs)
        legs = with_yardstick(legs, inputs, answers, folder, scratch, device)
        result = _compare(legs, ratio)
        if called is None:
            return result

        numbers = itertools.count(1)

        def rerun(names: Sequence[str], stages: Sequence[str], tokens: int) -> Comparison:
            with TemporaryDirectory(dir=scratch) as trial:
                again = record(
                    paths[0],
                    pathlib.Path(trial),
                    inputs,
                    folder,
                    device=device,
                    max_tokens=tokens,
                    ops=ops,
                    swap=[*swap, *names],
                    order=stages,
                    label=f"trial {next(numbers)}, {_few(names)} swapped",
                )
                return _compare(replace(legs, a=again), ratio)

        candidates = called.other_than_reference()
        return replace(result, bisection=explain(result, candidates, rerun, max_tokens))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} operations"


def _compare(legs: Legs, ratio: float) -> Comparison:
    dtypes = [leg.dtype for leg in (legs.a, legs.b) if leg.dtype != "float64"]
    eps = max(map(epsilon, dtypes))
    logits, partings = measure_logits(legs), find_partings(legs)
    parted = [parting.case for parting in partings]
    differences = RowDifferences()
    results = []
    for stage in legs.a.order:
        if stage not in legs.b.order:
            continue
        if stage in (stages.TOKENS, stages.TEXT):
            measure = measure_answers(legs, stage, parted)
        else:
            measure = measure_stage(legs, stage, differences)
        verdict = judge(measure, eps, partings, ratio)
        ratios = None if measure.note is not None else error_ratios(measure, eps)
        results.append(StageResult(stage, verdict, measure, ratios))
    differing = [one.measure for one in results if one.verdict is Verdict.DIFFERS]
    return Comparison(
        legs.a.describe(),
        legs.b.describe(),
        len(legs.a.cases),
        legs.exact is not None,
        results,
        logits,
        partings,
        worst_cases(legs, differences, differing, partings),
    )
