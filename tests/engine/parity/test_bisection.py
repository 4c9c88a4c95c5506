"""Operations that are swapped, and the search for those that explain a difference."""

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine.cli.parity_table import comparison_lines
from idefics2_engine.errors import ConfigError
from idefics2_engine.model import text
from idefics2_engine.parity.inputs import Case
from idefics2_engine.parity.measures.measure import StageMeasure
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.page.report import page_of
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.result import Comparison, StageResult
from idefics2_engine.parity.search.bisection import Bisection, Explanation, bisect, smallest_set
from idefics2_engine.parity.search.trials import explain
from idefics2_engine.parity.words import bisection_line
from idefics2_engine.report_page import Text
from idefics2_kernels import REFERENCE, ROW_BY_ROW, TRITON
from parity_recordings import compare_on_cpu, first_stage, record_path

TEXT = [Case.raw("a")]
ITEMS = "abcdefg"


def test_smallest_set_is_the_cause() -> None:
    for size in range(1, len(ITEMS) + 1):
        for cause in combinations(ITEMS, size):
            assert smallest_set(ITEMS, set(cause).issubset) == list(cause)


def test_items_are_tried_in_order() -> None:
    asked: list[Sequence[str]] = []

    def explains(names: Sequence[str]) -> bool:
        asked.append(names)
        return "c" in names

    assert smallest_set(ITEMS, explains) == ["c"]
    assert asked == [ITEMS, ["a"], ["b"], ["c"]]


def test_no_item_can_be_left_out_where_causes_overlap() -> None:
    """Not every superset of a cause explains the difference."""

    def explains(names: Sequence[str]) -> bool:
        return {"b", "d"} <= set(names) != {"b", "d", "e"} or {"a", "c", "f"} <= set(names)

    found = smallest_set(ITEMS, explains)
    assert explains(found)
    assert not any(explains([one for one in found if one != item]) for item in found)


def test_nothing_explains() -> None:
    asked: list[Sequence[str]] = []

    def explains(names: Sequence[str]) -> bool:
        asked.append(names)
        return False

    assert smallest_set(ITEMS, explains) == []
    assert asked == [ITEMS]
    assert smallest_set("", explains) == []
    assert asked == [ITEMS]


def test_stages_are_explained_one_after_another() -> None:
    causes = {"first": {"a"}, "second": {"b", "c"}, "third": {"nothing"}}

    def differs(names: Sequence[str], stage: str) -> bool:
        return not causes[stage] <= set(names)

    def next_difference(names: Sequence[str]) -> str | None:
        return next((stage for stage in causes if differs(names, stage)), None)

    found = bisect("first", "abcd", differs, next_difference)
    assert found.explanations == (
        Explanation("first", ("a",)),
        Explanation("second", ("b", "c")),
        Explanation("third", ()),
    )
    assert found.operations == ["a", "b", "c"]
    assert found.unexplained == "third"
    # All of a to d and a alone; all, single and pairs of b to d; d; and twice the stages after
    assert found.trials == 2 + 7 + 1 + 2


@pytest.mark.parametrize(
    ("explanations", "line"),
    [
        ((), "nothing to bisect: no stage differs"),
        (
            (Explanation("text layer 0", ("rms_norm",)),),
            "swapping rms_norm makes every stage within rounding (4 trials)",
        ),
        (
            (Explanation("projection", ("linear", "silu_mul", "patches")),),
            "swapping linear, silu_mul and patches makes every stage within rounding (4 trials)",
        ),
        (
            (Explanation("projection", ("silu_mul",)), Explanation("logits", ("linear",))),
            "swapping silu_mul makes projection within rounding; swapping linear makes logits "
            "within rounding; then every stage is within rounding (4 trials)",
        ),
        (
            (Explanation("logits", ()),),
            "no operation explains logits: weights, inputs or code outside the operations "
            "(4 trials)",
        ),
    ],
)
def test_result_is_a_line(explanations: tuple[Explanation, ...], line: str) -> None:
    assert bisection_line(Bisection(explanations, 4)) == line


def gate_and_up_swapped(gate_up: Tensor) -> Tensor:
    return REFERENCE.silu_mul(torch.cat(gate_up.chunk(2, -1)[::-1], -1))


def scaled_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return REFERENCE.rms_norm(x, weight, eps) * 1.001


def scaled_norm_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, eps)
    return normed * 1.001, total


@pytest.fixture(scope="module")
def short_theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record transformers on a short text."""
    pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("parity") / "theirs"
    record_path("transformers", folder, cases=TEXT)
    return folder


def test_wrong_operation_is_found_among_right_ones(short_theirs: Path) -> None:
    ops = replace(ROW_BY_ROW, silu_mul=gate_and_up_swapped)
    found = compare_on_cpu("ours", short_theirs, cases=TEXT, ops=ops, bisect=True)
    assert first_stage(found) == "text layer 0"
    assert found.bisection is not None
    assert found.bisection.explanations == (Explanation("text layer 0", ("silu_mul",)),)
    assert comparison_lines(found)[-1].startswith("swapping silu_mul makes every stage within")
    assert "Swapping silu_mul makes every stage within rounding (" in page_of(found).subtitle


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_names_each_leg_and_trial(
    short_theirs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level("INFO", "idefics2_engine.parity")
    ops = replace(REFERENCE, silu_mul=gate_and_up_swapped)
    compare_on_cpu("ours:reference", "ours", cases=TEXT, ops=ops, bisect=True)
    labels = ["A ours:reference", "B ours", "float64"]
    labels += [f"trial {number}, silu_mul swapped" for number in (1, 2)]
    assert caplog.messages == [f"computing {label}, 1 case" for label in labels]
    assert all(f"{label}:   0%" in terminal.getvalue() for label in labels)


def test_sides_say_which_operations_are_not_the_paths(short_theirs: Path) -> None:
    ops = replace(REFERENCE, silu_mul=gate_and_up_swapped, rms_norm=scaled_norm)
    settings = {"cases": TEXT, "ops": ops, "swap": ["rms_norm"], "bisect": True}
    found = compare_on_cpu("ours:reference", short_theirs, **settings)
    assert found.a["replaced"] == ["silu_mul"]
    said = "operations replaced: silu_mul, with the reference's rms_norm"
    assert said in comparison_lines(found)[0]
    (sides,) = (table for table in page_of(found).tables if table.heading == "Sides")
    assert list(sides.rows[0].cells[1]) == [Text("ours:reference"), Text(said, "muted")]
    # With another operation A is not the reference, by which it can be judged
    exact = compare_on_cpu("ours:reference", "float64", cases=TEXT, ops=ops)
    assert exact.first_difference is not None
    same = compare_on_cpu("ours:reference", short_theirs, cases=TEXT, ops=REFERENCE)
    assert "replaced" not in comparison_lines(same)[0]
    assert found.to_dict()["bisection"]["explanations"][0]["operations"] == ("silu_mul",)


def test_two_wrong_operations_are_found_together(short_theirs: Path) -> None:
    ops = replace(ROW_BY_ROW, rms_norm=scaled_norm, add_rms_norm=scaled_norm_of_sum)
    found = compare_on_cpu("ours", short_theirs, cases=TEXT, ops=ops, bisect=True)
    assert found.bisection is not None
    (explanation,) = found.bisection.explanations
    assert explanation.stage == "text layer 0"
    assert set(explanation.operations) == {"rms_norm", "add_rms_norm"}


def wrong_after_the_prompt(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = REFERENCE.paged_attention(q, *args, **kwargs)
    return out * 1.1 if len(q) == 1 else out


def test_answers_of_trials_are_judged_by_those_of_b(short_theirs: Path) -> None:
    """With one fault A answers other tokens, so that the other fault is seen only without it."""
    ops = replace(REFERENCE, silu_mul=gate_and_up_swapped, paged_attention=wrong_after_the_prompt)
    found = compare_on_cpu("ours", short_theirs, cases=TEXT, ops=ops, bisect=True)
    assert found.partings[0].index == 0
    assert found.bisection is not None
    assert set(found.bisection.operations) == {"silu_mul", "paged_attention"}
    assert found.bisection.unexplained is None


def test_operations_that_were_not_called_are_not_tried(short_theirs: Path) -> None:
    ops = replace(REFERENCE, silu_mul=gate_and_up_swapped, patches=TRITON.patches)
    found = compare_on_cpu("ours", short_theirs, cases=TEXT, ops=ops, bisect=True)
    # One trial explains the stage, and one looks at the stages after it
    assert found.bisection == Bisection((Explanation("text layer 0", ("silu_mul",)),), 2)


def test_difference_outside_the_operations_is_not_explained(
    short_theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = text.rotary_table
    monkeypatch.setattr(text, "rotary_table", lambda config: table(config).bfloat16().float())
    found = compare_on_cpu("ours:deterministic", short_theirs, cases=TEXT, bisect=True)
    assert found.bisection == Bisection((Explanation("text layer 0", ()),), 1)
    assert "no operation explains text layer 0" in comparison_lines(found)[-1]


def test_no_operation_is_tried_for_an_input() -> None:
    """Tiles are prepared before the first operation is called."""
    result = StageResult("tiles", Verdict.DIFFERS, StageMeasure("tiles"), None)
    comparison = Comparison({}, {}, 1, True, [result], None, [], [])

    def rerun(*_: object) -> Comparison:
        raise AssertionError("nothing must be computed")

    found = explain(comparison, ["patches", "linear"], rerun, max_tokens=4)
    assert found == Bisection((Explanation("tiles", ()),), 0)


def test_trial_computes_only_what_its_stage_needs() -> None:
    asked = []

    def comparison(*names: str) -> Comparison:
        results = [StageResult(n, Verdict.DIFFERS, StageMeasure(n), None) for n in names]
        return Comparison({}, {}, 1, True, results, None, [], [])

    def rerun(names: Sequence[str], order: Sequence[str], max_tokens: int) -> Comparison:
        asked.append((list(names), list(order), max_tokens))
        return comparison(*order)

    for stage, order, tokens in (
        ("projection", ["projection"], 1),
        ("text layer 0 keys", ["text layer 0 keys"], 4),
        ("text", ["logits", "tokens", "text"], 4),
    ):
        found = explain(comparison(stage, "logits"), ["linear"], rerun, max_tokens=4)
        assert found.unexplained == stage
        assert asked.pop() == (["linear"], order, tokens)


def test_nothing_is_tried_if_no_stage_differs(short_theirs: Path) -> None:
    found = compare_on_cpu("ours:deterministic", short_theirs, cases=TEXT, bisect=True)
    assert found.bisection == Bisection((), 0)


def test_swapped_operation_is_the_references(short_theirs: Path, tmp_path: Path) -> None:
    ops = replace(ROW_BY_ROW, silu_mul=gate_and_up_swapped)
    settings = {"cases": TEXT, "ops": ops, "swap": ["silu_mul"]}
    found = compare_on_cpu("ours", short_theirs, save=tmp_path / "a", **settings)
    assert found.within_rounding
    assert Recording.load(tmp_path / "a").about["swap"] == ["silu_mul"]
    assert "with the reference's silu_mul" in comparison_lines(found)[0]
    whole = [field for field in REFERENCE.__dataclass_fields__ if field != "sample"]
    assert compare_on_cpu("ours:deterministic", "ours", cases=TEXT, swap=whole).same_bits


def test_wrong_arguments_are_refused(short_theirs: Path, tmp_path: Path) -> None:
    wanted = "an operation to swap must be one of linear, .*, sample, got 'rmsnorm'"
    with pytest.raises(ConfigError, match=wanted):
        compare_on_cpu("ours", short_theirs, swap=["rmsnorm"])
    for name in ("swap", "bisect"):
        with pytest.raises(ConfigError, match=f"{name} must come with a path of ours as A"):
            compare_on_cpu(short_theirs, "ours", **{name: ["linear"]})
    with pytest.raises(ConfigError, match="swap must come with a path of ours"):
        record_path("transformers", tmp_path / "a", swap=["linear"])
    with pytest.raises(ConfigError, match="bisect must come with the float64 leg"):
        compare_on_cpu("ours", short_theirs, bisect=True, float64=False)
