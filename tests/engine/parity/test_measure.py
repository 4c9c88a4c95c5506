"""Figures and verdicts of small recordings that are written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine.parity.measures.logits import find_partings, measure_logits
from idefics2_engine.parity.measures.measure import Legs, measure_answers, measure_stage
from idefics2_engine.parity.measures.verdict import PEER_FACTOR, RATIO, Verdict, error_ratios, judge
from idefics2_engine.parity.recording.case_recording import CaseRecording, id_matrix
from idefics2_engine.parity.recording.dump import Recording, write_recording

EPS = torch.finfo(torch.float32).eps
STAGE = "text layer 0"


def recording(
    folder: Path, stages: dict[str, list[Tensor]], answer: tuple[int, ...] = (5, 6), **more: Any
) -> Recording:
    """Write a recording of one case with the prompt 1 2 3."""
    case = CaseRecording([1, 2, 3], list(answer), "text", list("abcdef"), [], 1)
    case = CaseRecording(**{**case.__dict__, **more})
    case.stages = {"tokens": [id_matrix(case.answer_ids)], **stages}
    return write_recording(folder, "ours", "float32", False, [*stages], {}, [case])


def rows(*values: float) -> list[Tensor]:
    """Return a stage of four tokens, whose rows are 1 and a value."""
    matrix = torch.tensor([[1.0, value] for value in values], dtype=torch.float64)
    return [matrix[:3], matrix[3:]]


def legs(folder: Path, *stages: list[Tensor]) -> Legs:
    found = [recording(folder / str(i), {STAGE: parts}) for i, parts in enumerate(stages)]
    return Legs(*found)


def test_errors_are_relative_to_the_rows_largest_value(tmp_path: Path) -> None:
    exact = rows(0.0, 0.0, 4.0, 0.0)
    measure = measure_stage(
        legs(tmp_path, rows(0.1, 0.0, 4.8, 0.0), rows(0.0, 0.0, 4.0, 0.05), exact), STAGE
    )
    assert measure.largest == pytest.approx(0.2)
    assert measure.place == {"case": 0, "token": 2, "token_text": "c", "element": 1}
    # The rows' differences are 0.1, 0, 0.2 and 0.05
    assert measure.median == pytest.approx(0.05)
    assert measure.num_rows == 4
    assert (measure.error_a, measure.error_b) == pytest.approx((0.2, 0.05))
    assert error_ratios(measure, 0.05) == pytest.approx((2.0, 0.05 / 0.25))
    assert judge(measure, 0.05, ratio=2.01) is Verdict.WITHIN_ROUNDING
    assert judge(measure, 0.05, ratio=1.99) is Verdict.DIFFERS


def test_yardstick_takes_the_place_of_the_other_side(tmp_path: Path) -> None:
    four = legs(
        tmp_path, rows(0.1, 0, 0, 0), rows(0.3, 0, 0, 0), rows(0, 0, 0, 0), rows(0.2, 0, 0, 0)
    )
    measure = measure_stage(four, STAGE)
    assert error_ratios(measure, 0.0) == pytest.approx((0.5, 1.5))


def test_side_b_may_be_less_exact_but_not_wrong(tmp_path: Path) -> None:
    exact = rows(0, 0, 0, 0)
    for name, factor, verdict in (
        ("less", 0.99, Verdict.WITHIN_ROUNDING),
        ("wrong", 1.01, Verdict.DIFFERS),
    ):
        error = factor * RATIO * PEER_FACTOR * 0.01
        three = legs(tmp_path / name, rows(0.01, 0, 0, 0), rows(error, 0, 0, 0), exact)
        assert judge(measure_stage(three, STAGE), 0.0) is verdict


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_differ(value: float, tmp_path: Path) -> None:
    exact = rows(0, 0, 0, 0)
    for name, a, b in (("a", rows(0, value, 0, 0), exact), ("b", exact, rows(0, value, 0, 0))):
        measure = measure_stage(legs(tmp_path / name, a, b, exact), STAGE)
        assert measure.place["token"] == 1
        assert judge(measure, EPS) is Verdict.DIFFERS


def test_same_bits_are_bits(tmp_path: Path) -> None:
    for name, a, b, same in (
        ("nan", rows(0, float("nan"), 0, 0), rows(0, float("nan"), 0, 0), True),
        ("zeros", rows(0, 0.0, 0, 0), rows(0, -0.0, 0, 0), False),
        ("dtypes", rows(0, 0, 0, 0), [part.float() for part in rows(0, 0, 0, 0)], False),
    ):
        measure = measure_stage(legs(tmp_path / name, a, b), STAGE)
        assert measure.same_bits is same, name
        wanted = Verdict.SAME_BITS if same else Verdict.NOT_JUDGED
        assert judge(measure, EPS) is wanted, name


def test_shapes_must_be_the_same(tmp_path: Path) -> None:
    patches = torch.zeros(4, 2)
    for name, parts, note in (
        ("rows", [patches[:3]], "case 0: shapes (4, 2) and (3, 2)"),
        ("parts", [patches, patches], "case 0: 1 and 2 parts"),
    ):
        a, b = (
            recording(tmp_path / name / side, {"projection": stage}, grids=[(2, 2)] * 2)
            for side, stage in (("a", [patches]), ("b", parts))
        )
        measure = measure_stage(Legs(a, b), "projection")
        assert measure.note == note
        assert judge(measure, EPS) is Verdict.DIFFERS


def test_only_rows_with_the_same_tokens_before_are_compared(tmp_path: Path) -> None:
    answers = ((5, 6, 7), (5, 8, 7))
    both = []
    for side, (answer, last) in enumerate(zip(answers, (1.0, 2.0), strict=True)):
        matrix = torch.tensor([[1.0, 0.0]] * 4 + [[1.0, last]])
        parts = [matrix[:3], matrix[3:]]
        both.append(recording(tmp_path / str(side), {STAGE: parts}, answer))
    measure = measure_stage(Legs(*both), STAGE)
    assert measure.same_bits
    assert measure.num_rows == 4


def logits(*pairs: tuple[float, float]) -> list[Tensor]:
    matrix = torch.tensor(pairs, dtype=torch.float64)
    return [matrix[:3], matrix[3:]]


def test_logits_agreement_kl_and_margin(tmp_path: Path) -> None:
    a = logits((2, 1), (1, 2), (3, 0), (0.0, 0.1))
    b = logits((2, 1), (1, 2), (3, 0), (0.1, 0.0))
    both = [recording(tmp_path / n, {"logits": own}) for n, own in (("a", a), ("b", b))]
    found = measure_logits(Legs(*both))
    assert found is not None
    assert found.top1_agreement == 0.75
    assert found.largest_margin == pytest.approx(0.1)
    assert [one["token"] for one in found.disagreements] == [3]
    p, q = a[1][0].softmax(-1), b[1][0].softmax(-1)
    assert found.largest_kl == pytest.approx(float((p * (p / q).log()).sum()))
    assert found.mean_kl == pytest.approx(found.largest_kl / 4)


@pytest.mark.parametrize(("error", "verdict"), [(0.3, "within rounding"), (0.1, "differs")])
def test_answers_may_part_at_a_near_tie(error: float, verdict: str, tmp_path: Path) -> None:
    """Answers part at a margin of 0.4, which errors of 0.3 on both sides explain."""
    exact = logits((0, 1), (0, 1), (0, 1), (0.4, 0.0))
    sides = []
    for name, answer, sign in (("a", (1, 0), 1), ("b", (1, 1), -1)):
        own = [exact[0], exact[1] + sign * error * torch.tensor([[1.0, -1.0]])]
        more = {"text": name}
        sides.append(recording(tmp_path / name, {"logits": own}, answer, **more))
    a, b = sides
    three = Legs(a, b, recording(tmp_path / "exact", {"logits": exact}))
    (parting,) = find_partings(three)
    assert (parting.index, parting.tokens) == (1, (0, 1))
    assert parting.margin == pytest.approx(0.4)
    for stage in ("tokens", "text"):
        measure = measure_answers(three, stage, [0])
        assert judge(measure, EPS, [parting]) == verdict


def test_answers_to_other_prompts_and_other_texts_differ(tmp_path: Path) -> None:
    first = recording(tmp_path / "a", {})
    for name, more, stage, note in (
        ("prompt", {"prompt_ids": [1, 2, 4], "answer_ids": [7]}, "tokens", "unequal prompts"),
        ("text", {"text": "other"}, "text", "equal tokens have another text"),
    ):
        both = Legs(first, recording(tmp_path / name, {}, **more))
        assert find_partings(both) == []
        measure = measure_answers(both, stage, [])
        assert measure.note is not None
        assert note in measure.note
        assert judge(measure, EPS) is Verdict.DIFFERS
