"""What people read of a comparison: its result in one line, and places in words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idefics2_engine.parity.result import Comparison


def headline(comparison: "Comparison") -> str:
    """Return the result in one line."""
    first = comparison.first_difference
    if first is not None:
        where = first.measure.note or place_text(first.measure.place)
        return f"first difference beyond rounding: {first.stage}{where and f', {where}'}"
    if comparison.same_bits:
        return "same bits at every stage"
    if comparison.within_rounding:
        return "no difference beyond rounding"
    return "bits differ, and without a float64 leg rounding is not judged"


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
