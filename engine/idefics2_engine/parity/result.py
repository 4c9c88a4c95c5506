"""The result of a comparison."""

from dataclasses import asdict, dataclass, field
from typing import Any

from idefics2_engine.parity.measures.logits import LogitsMeasure, Parting
from idefics2_engine.parity.measures.measure import StageMeasure
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.measures.worst_cases import WorstCase
from idefics2_engine.parity.search.bisection import Bisection
from idefics2_engine.parity.words import headline, stage_text


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

    def __str__(self) -> str:
        """Return the stage and where its largest difference is."""
        return stage_text(self)


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
        worst_cases: The differences of every row, of the worst cases. Empty if one side is a
            digest.
        bisection: What explains the differences. ``None`` if it was not searched for.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    num_cases: int
    is_judged: bool
    stages: list[StageResult] = field(repr=False)
    logits: LogitsMeasure | None
    partings: list[Parting]
    worst_cases: list[WorstCase] = field(repr=False)
    bisection: Bisection | None = None

    def __str__(self) -> str:
        """Return the result in one line."""
        return headline(self)

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
            "bisection": None if self.bisection is None else asdict(self.bisection),
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    infinite = (float("inf"), float("-inf"))
    return {
        name: None if isinstance(value, float) and (value in infinite or value != value) else value
        for name, value in values.items()
    }
