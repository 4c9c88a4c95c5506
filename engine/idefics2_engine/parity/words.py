"""What people read of a comparison: its result in lines, and places in words."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idefics2_engine.parity.result import Comparison, StageResult
    from idefics2_engine.parity.search.bisection import Bisection


def headline(comparison: "Comparison") -> str:
    """Return the result in one line."""
    first = comparison.first_difference
    if first is not None:
        return f"first difference beyond rounding: {first}"
    if comparison.same_bits:
        return "same bits at every stage"
    if comparison.within_rounding:
        return "no difference beyond rounding"
    return "bits differ, and without a float64 leg rounding is not judged"


def stage_text(result: "StageResult") -> str:
    """Return a stage and where its largest difference is, or why it cannot be compared."""
    place = place_text(result.measure.place)
    where = result.measure.note or (place and f"largest at {place}")
    return f"{result.stage}{where and f', {where}'}"


def bisection_line(bisection: "Bisection") -> str:
    """Return which operations explain the differences, in one line."""
    if not bisection.explanations:
        return "nothing to bisect: no stage differs"
    count = bisection.trials
    trials = f"({count} trial{'s' if count > 1 else ''})" if count else "(no trial)"
    found = [
        f"swapping {_listed(one.operations)} makes {one.stage} within rounding"
        for one in bisection.explanations
        if one.operations
    ]
    if bisection.unexplained is not None:
        found.append(
            f"no operation explains {bisection.unexplained}: "
            "weights, inputs or code outside the operations"
        )
    elif len(found) == 1:
        found = [f"swapping {_listed(bisection.operations)} makes every stage within rounding"]
    else:
        found.append("then every stage is within rounding")
    return f"{'; '.join(found)} {trials}"


def _listed(names: Sequence[str]) -> str:
    """Return names as ``a, b and c``."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def replaced_text(side: Mapping[str, Any]) -> str:
    """Return which operations of a side are not those that its path names, if any."""
    words = []
    if side.get("replaced"):
        words.append(f"operations replaced: {', '.join(side['replaced'])}")
    if side.get("swap"):
        words.append(f"with the reference's {', '.join(side['swap'])}")
    return ", ".join(words)


def place_text(place: Mapping[str, Any]) -> str:
    """Return where a row is, in words, such as ``case 3, image 0 top left, patch 2 5``."""
    words: list[str] = []
    for name, value in place.items():
        match name:
            case "token_text":
                words[-1] += f" {value!r}"
            case "part":
                words[-1] += f" {value}"
            case "patch":
                words.append(f"patch {value[0]} {value[1]}")
            case "pixel_row":
                words.append(f"row {value} of pixels")
            case _:
                words.append(f"{name} {value}")
    return ", ".join(words)
