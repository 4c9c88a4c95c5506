"""How far two recordings are apart at a stage, and how far each is from float64."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.row_differences import RowDifferences
from idefics2_engine.parity.recording.digest import Digest
from idefics2_engine.parity.recording.dump import Part, Recording

_TINY = 1e-300


@dataclass
class StageMeasure:
    """What was measured at a stage, over all cases.

    Errors of a row are relative to the largest value of the row in float64, or in B without a
    float64 leg.

    Attributes:
        stage: The stage.
        same_bits: Whether A and B have the same bits.
        num_rows: Rows that were compared.
        largest: Largest difference of A and B in a row.
        median: Median of the rows' largest differences.
        error_a: Largest error of A against float64. ``None`` without a float64 leg.
        error_b: Largest error of B against float64.
        error_yardstick: Largest error against float64 of the reference in the narrower dtype of two.
        place: Where the largest difference is.
        note: Why the stages cannot be compared, if so.
    """

    stage: str
    same_bits: bool = True
    num_rows: int = 0
    largest: float = 0.0
    median: float = 0.0
    error_a: float | None = None
    error_b: float | None = None
    error_yardstick: float | None = None
    place: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Legs:
    """The recordings that are compared: two, and those by which they are judged."""

    a: Recording
    b: Recording
    exact: Recording | None = None
    yardstick: Recording | None = None


def measure_stage(
    legs: Legs, stage: str, differences: RowDifferences | None = None
) -> StageMeasure:
    """Compare A and B at ``stage``, part by part, and keep the ``differences`` of rows if wanted."""
    measure = StageMeasure(stage)
    rows: list[Tensor] = []
    if legs.exact is not None and stage not in stages.EXACT:
        measure.error_a = measure.error_b = 0.0
        if legs.yardstick is not None:
            measure.error_yardstick = 0.0
    for case in range(len(legs.a.cases)):
        parts_a, parts_b = legs.a.parts(case, stage), legs.b.parts(case, stage)
        if len(parts_a) != len(parts_b):
            _mark_unlike(measure, case, f"{len(parts_a)} and {len(parts_b)} parts")
            continue
        others = [
            [] if leg is None else leg.parts(case, stage) for leg in (legs.exact, legs.yardstick)
        ]
        counts = _common_rows(legs, case, stage, parts_a, parts_b)
        for part, (own_a, own_b) in enumerate(zip(parts_a, parts_b, strict=True)):
            exact, yardstick = (own[part] if part < len(own) else None for own in others)
            if stage in stages.EXACT:
                exact = yardstick = None
            found = _measure_part(measure, own_a, own_b, exact, yardstick, counts[part])
            if differences is not None:
                differences.keep(case, stage, None if found is None else found[0])
            if found is None:
                shapes = f"shapes {_shape(own_a)} and {_shape(own_b)}"
                _mark_unlike(measure, case, shapes, legs.a.cases[case].place(stage, part, 0))
                continue
            errors, row, element = found
            if len(errors) and float(errors.max()) >= measure.largest and not measure.note:
                measure.largest = float(errors.max())
                place = legs.a.cases[case].place(stage, part, row)
                measure.place = {"case": case, **place, "element": element}
            rows.append(errors)
    if rows:
        joined = torch.cat(rows)
        measure.num_rows = len(joined)
        measure.median = float(joined.median()) if len(joined) else 0.0
    if measure.same_bits:
        measure.place = {}
    return measure


def measure_answers(legs: Legs, stage: str, parted: Collection[int]) -> StageMeasure:
    """Compare the tokens or the texts of answers.

    ``parted`` are the cases whose tokens part after equal prompts. Any other difference is noted.
    """
    measure = StageMeasure(stage)
    for case, (own_a, own_b) in enumerate(zip(legs.a.cases, legs.b.cases, strict=True)):
        measure.num_rows += len(own_a.answer_ids) if stage == stages.TOKENS else 1
        same = (
            own_a.answer_ids == own_b.answer_ids
            if stage == stages.TOKENS
            else own_a.text == own_b.text
        )
        measure.same_bits &= same
        if not same and case not in parted and measure.note is None:
            tokens = own_a.answer_ids == own_b.answer_ids
            reason = "equal tokens have another text" if tokens else "answers to unequal prompts"
            measure.note, measure.place = f"case {case}: {reason}", {"case": case}
        elif not same and not measure.place:
            measure.place = {"case": case}
    return measure


def common_length(legs: Legs, case: int) -> int:
    """Return the number of tokens of prompt and answer before A and B part."""
    ids_a, ids_b = legs.a.cases[case].ids, legs.b.cases[case].ids
    pairs = zip(ids_a, ids_b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(ids_a), len(ids_b)))


def _common_rows(
    legs: Legs, case: int, stage: str, parts_a: list[Part], parts_b: list[Part]
) -> list[int | None]:
    """Return how many rows of each part have the same tokens before them, ``None`` for all."""
    if stages.unit(stage) != "token" or stage in stages.EXACT:
        return [None] * len(parts_a)
    known = common_length(legs, case)
    counts: list[int | None] = []
    for own_a, own_b in zip(parts_a, parts_b, strict=True):
        count = min(known, _shape(own_a)[0], _shape(own_b)[0])
        known -= count
        counts.append(count)
    return counts


def _measure_part(
    measure: StageMeasure,
    own_a: Part,
    own_b: Part,
    exact: Part | None,
    yardstick: Part | None,
    count: int | None,
) -> tuple[Tensor, int, int] | None:
    """Add a part to ``measure``.

    Returns:
        The difference of each row, and the row and element of the largest one. ``None`` if the
        parts have different shapes.
    """
    if count is None:
        if _shape(own_a) != _shape(own_b):
            return None
        count = _shape(own_a)[0]
    elif _shape(own_a)[1:] != _shape(own_b)[1:]:
        return None
    legs = [leg for leg in (own_a, own_b, exact, yardstick) if leg is not None]
    if not all(_shape(leg)[0] >= count and _shape(leg)[1:] == _shape(own_a)[1:] for leg in legs):
        return None
    same = _have_same_bits(own_a, own_b, count)
    measure.same_bits &= same
    if same and exact is None:
        return torch.zeros(count, dtype=torch.float64), 0, 0
    views = list(_views(legs, count))
    errors, row, element = torch.zeros(0, dtype=torch.float64), 0, 0
    for view in views:
        values = [value.double() for value in view]
        a, b = values[:2]
        if not a.numel():
            continue
        truth = values[2] if exact is not None else b
        scale = truth.abs().amax(-1)
        difference = (a - b).abs().nan_to_num(torch.inf, torch.inf)
        own = _relative(difference.amax(-1), scale)
        if not len(errors) or float(own.max()) > float(errors.max()):
            row = int(own.argmax())
            element = int(difference[row].argmax())
        # The view of samples is no row of the part
        errors = own if not len(errors) else torch.maximum(errors, own.max())
        if exact is not None:
            measure.error_a = max(measure.error_a or 0.0, _worst(a, truth, scale))
            measure.error_b = max(measure.error_b or 0.0, _worst(b, truth, scale))
            if yardstick is not None:
                worst = _worst(values[3], truth, scale)
                measure.error_yardstick = max(measure.error_yardstick or 0.0, worst)
    return errors, row, element


def _views(legs: list[Part], count: int) -> Iterator[list[Tensor]]:
    """Yield matrices to compare: the first ``count`` rows, or what digests have of them."""
    if any(isinstance(leg, Digest) for leg in legs):
        digests = [leg if isinstance(leg, Digest) else Digest.of(leg) for leg in legs]
        yield from (list(view) for view in zip(*(d.rows(count) for d in digests), strict=True))
    else:
        yield [leg[:count] for leg in legs if isinstance(leg, Tensor)]


def _have_same_bits(own_a: Part, own_b: Part, count: int) -> bool:
    if isinstance(own_a, Tensor) and isinstance(own_b, Tensor):
        if own_a.dtype != own_b.dtype:
            return False
        bits = [part[:count].contiguous().flatten().view(torch.uint8) for part in (own_a, own_b)]
        return torch.equal(*bits)
    digests = [part if isinstance(part, Digest) else Digest.of(part) for part in (own_a, own_b)]
    if any(digest.shape[0] != count for digest in digests):
        return count == 0
    return digests[0].sha256 == digests[1].sha256


def _relative(error: Tensor, scale: Tensor) -> Tensor:
    return torch.where(error > 0, error / scale.clamp(min=_TINY), 0.0)


def _worst(values: Tensor, exact: Tensor, scale: Tensor) -> float:
    error = (values - exact).abs().nan_to_num(torch.inf, torch.inf).amax(-1)
    return float(_relative(error, scale).max())


def _shape(part: Part) -> tuple[int, ...]:
    return tuple(part.shape)


def _mark_unlike(
    measure: StageMeasure, case: int, note: str, place: dict[str, Any] | None = None
) -> None:
    """Record that a case has another number or shape of parts in A and B."""
    measure.same_bits = False
    measure.largest = float("inf")
    if measure.note is None:
        measure.note = f"case {case}: {note}"
        measure.place = {"case": case, **(place or {})}
