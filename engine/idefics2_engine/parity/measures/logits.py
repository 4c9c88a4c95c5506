"""Logits of two recordings: agreement of the best token, KL divergence, and where answers part."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.agreement.logits import compare_logits
from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.measure import Legs, common_length

_EXAMPLES = 5


@dataclass
class LogitsMeasure:
    """How two recordings of logits differ, over all tokens that both have.

    Attributes:
        num_rows: Tokens that were compared.
        top1_agreement: Share of tokens for which A and B have the same best successor.
        largest_kl: Largest KL divergence of B's distribution from A's, in nats.
        mean_kl: Mean of it.
        largest_margin: Where they disagree, the largest margin between the two best tokens in
            float64, or in B without a float64 leg.
        disagreements: The first tokens with another best successor.
    """

    num_rows: int
    top1_agreement: float
    largest_kl: float
    mean_kl: float
    largest_margin: float
    disagreements: list[dict[str, Any]]


@dataclass(frozen=True)
class Parting:
    """Where the answers to a case part.

    Attributes:
        case: The case.
        index: Index of the first other token in the answer.
        tokens: The tokens of A and B, ``None`` where an answer has ended.
        margin: Difference of their logits in float64, or in B without a float64 leg.
        room: The largest difference that the errors of A and B at this token explain.
    """

    case: int
    index: int
    tokens: tuple[int | None, int | None]
    margin: float
    room: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains that another token was chosen."""
        return self.margin <= self.room


def measure_logits(legs: Legs) -> LogitsMeasure | None:
    """Compare the distributions of A and B; ``None`` if one has only a digest of its logits."""
    divergences: list[Tensor] = []
    agreed, largest_margin = 0, 0.0
    disagreements: list[dict[str, Any]] = []
    for case in range(len(legs.a.cases)):
        rows = _logits(legs, case)
        if rows is None:
            return None
        a, b, truth = rows
        found = compare_logits(a, b, truth)
        divergences.append(found.kl)
        agreed += int(found.agrees.sum())
        for row in (~found.agrees).nonzero().flatten().tolist():
            margin = float(found.margins[row])
            largest_margin = max(largest_margin, margin)
            if len(disagreements) < _EXAMPLES:
                place = legs.a.cases[case].place(stages.LOGITS, 0, row)
                best = [int(found.best_a[row]), int(found.best_b[row])]
                disagreements.append({"case": case, **place, "best": best, "margin": margin})
    kl = torch.cat(divergences)
    count = len(kl)
    return LogitsMeasure(
        count,
        agreed / count if count else 1.0,
        float(kl.max()) if count else 0.0,
        float(kl.mean()) if count else 0.0,
        largest_margin,
        disagreements,
    )


def find_partings(legs: Legs) -> list[Parting]:
    """Return where answers part, of the cases whose prompts have the same tokens."""
    partings = []
    for case, (own_a, own_b) in enumerate(zip(legs.a.cases, legs.b.cases, strict=True)):
        if own_a.prompt_ids != own_b.prompt_ids or own_a.answer_ids == own_b.answer_ids:
            continue
        index = common_length(legs, case) - len(own_a.prompt_ids)
        answers = own_a.answer_ids, own_b.answer_ids
        tokens = tuple(ids[index] if index < len(ids) else None for ids in answers)
        margin, room = float("inf"), 0.0
        rows = _logits(legs, case)
        if rows is not None and None not in tokens:
            row = len(own_a.prompt_ids) + index - 1
            a, b, truth = (one[row] for one in rows)
            margin = float((truth[tokens[0]] - truth[tokens[1]]).abs())
            room = float((a - truth).abs().max() + (b - truth).abs().max())
        partings.append(Parting(case, index, (tokens[0], tokens[1]), margin, room))
    return partings


def _logits(legs: Legs, case: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the logits of A, B and the truth for the tokens that all have, in float64."""
    known = common_length(legs, case)
    found = []
    for leg in (legs.a, legs.b, legs.exact or legs.b):
        parts = leg.parts(case, stages.LOGITS)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not parts or len(tensors) < len(parts):
            return None
        found.append(torch.cat(tensors).double()[:known])
    count = min(map(len, found))
    a, b, truth = (one[:count] for one in found)
    return a, b, truth
