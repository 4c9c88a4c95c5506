"""The verdict on a stage, by the project's criterion and not by a tolerance.

Through a whole model the direction of a rounding error is chance. So the worst row of each side is
compared, relative to its largest value: the error of A against float64 may be ``RATIO`` times that
of B, plus the dtype's epsilon. B is the yardstick and may be less exact than A, by chance or because
it rounds more often. But an error of B that is ``PEER_FACTOR`` times as large as this is no rounding
either. Sides of different dtypes are both compared with the reference in the narrower one.
"""

from collections.abc import Sequence
from enum import StrEnum

from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.logits import Parting
from idefics2_engine.parity.measures.measure import StageMeasure
from idefics2_kernels.catalog.criterion import RATIO

__all__ = ["PEER_FACTOR", "RATIO", "Verdict", "error_ratios", "judge"]

# On the demo checkpoint in fp32, the error of transformers' worst row is up to 3.7 times that of the
# reference
PEER_FACTOR = 4.0


class Verdict(StrEnum):
    """How two recordings compare at a stage."""

    SAME_BITS = "same bits"
    WITHIN_ROUNDING = "within rounding"
    DIFFERS = "differs"
    NOT_JUDGED = "not judged"


def error_ratios(measure: StageMeasure, eps: float) -> tuple[float, float] | None:
    """Return the errors of A and B against float64, as multiples of their yardstick's.

    ``eps`` is that of the narrower dtype. ``None`` without a float64 leg.
    """
    if measure.error_a is None or measure.error_b is None:
        return None
    yardstick = measure.error_yardstick
    of_a, of_b = (measure.error_b, measure.error_a) if yardstick is None else (yardstick, yardstick)
    return measure.error_a / (of_a + eps), measure.error_b / (of_b + eps)


def judge(
    measure: StageMeasure,
    eps: float,
    partings: Sequence[Parting] = (),
    ratio: float = RATIO,
) -> Verdict:
    """Return the verdict on a stage.

    Args:
        measure: What was measured.
        eps: Epsilon of the narrower dtype of the two sides.
        partings: Where the answers part, for the stages of tokens and text.
        ratio: The ratio of errors that is still rounding, for A. ``PEER_FACTOR`` times that for B.
    """
    if measure.same_bits:
        return Verdict.SAME_BITS
    if measure.note is not None:
        return Verdict.DIFFERS
    if measure.stage in (stages.TOKENS, stages.TEXT):
        explained = all(parting.is_near_tie for parting in partings)
        return Verdict.WITHIN_ROUNDING if explained else Verdict.DIFFERS
    if measure.stage in stages.EXACT:
        return Verdict.DIFFERS
    ratios = error_ratios(measure, eps)
    if ratios is None:
        return Verdict.NOT_JUDGED
    # The ratio of infinite errors is NaN, which is not within anything
    is_rounding = ratios[0] <= ratio and ratios[1] <= PEER_FACTOR * ratio
    return Verdict.WITHIN_ROUNDING if is_rounding else Verdict.DIFFERS
