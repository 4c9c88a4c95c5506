"""The cases in which A and B are furthest apart, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from idefics2_engine.parity.measures.case_pictures import CasePicture, case_pictures
from idefics2_engine.parity.measures.logits import Parting
from idefics2_engine.parity.measures.measure import Legs, StageMeasure
from idefics2_engine.parity.measures.row_differences import RowDifferences, Rows
from idefics2_engine.parity.recording.case_recording import CaseRecording

MOST_CASES = 6
"""Cases whose rows a comparison keeps, so that its size does not depend on the inputs."""

# Characters of a question in a title
_MOST_ASKED = 48


@dataclass(frozen=True)
class WorstCase:
    """One case, with one number for each row of each stage.

    Attributes:
        case: Which it is.
        recording: What A has of it, without stages.
        differences: Differences of A and B in the rows of each part of each stage, relative to the
            row's largest value. A part that cannot be compared has no rows.
        pictures: Its pictures.
    """

    case: int
    recording: CaseRecording = field(repr=False)
    differences: dict[str, list[Rows]] = field(repr=False)
    pictures: list[CasePicture] = field(repr=False)

    @property
    def title(self) -> str:
        """Its number, what is asked, if it is known, and how many pictures it has."""
        asked = self.recording.question
        if len(asked) > _MOST_ASKED:
            asked = f"{asked[: _MOST_ASKED - 1]}…"
        count = len(self.pictures)
        images = f"{count} image{'s' if count > 1 else ''}" if count else ""
        return ", ".join(filter(None, [f"Case {self.case}", asked and f'"{asked}"', images]))


def worst_cases(
    legs: Legs,
    differences: RowDifferences,
    differing: Sequence[StageMeasure],
    partings: Sequence[Parting],
) -> list[WorstCase]:
    """Return at most ``MOST_CASES`` cases, the worst first.

    These are the cases with the largest difference at the first of the stages that are
    ``differing``, or at any stage if there are none. Of digests, no differences of rows are known.
    """
    if legs.a.is_digest or legs.b.is_digest:
        return []
    first = differing[0] if differing else None
    parted = [parting.case for parting in partings]

    def badness(case: int) -> tuple[bool, float, bool, float]:
        at_first = first is not None and first.place.get("case") == case
        own = 0.0 if first is None else differences.largest(case, [first.stage])
        return at_first, own, case in parted, differences.largest(case, legs.a.order)

    order = sorted(range(len(legs.a.cases)), key=badness, reverse=True)
    return [
        WorstCase(case, legs.a.cases[case], differences.of(case), case_pictures(legs.a, case))
        for case in order[:MOST_CASES]
    ]
