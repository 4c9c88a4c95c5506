"""Shades of a heat map: steps of a logarithmic scale, their legend, and cells in their colors."""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from idefics2_engine.charts import drawing
from idefics2_engine.charts.drawing import element

NUM_SHADES = 12
"""Shades of ``STYLE``, ``--h-0`` for the smallest values."""

_SAME = NUM_SHADES
_NOTHING = -1
# Steps in decades; the first that fits counts
_STEPS = (1 / 3, 1 / 2, 2 / 3, 1, 2, 4)
_BOX = 12.0
_LINE = 18.0
_SPACE = 6.0

Values = npt.NDArray[np.floating[Any]]
"""Numbers that are at least 0. NaN is no value."""


@dataclass(frozen=True)
class Shades:
    """A logarithmic scale of ``NUM_SHADES`` steps.

    Attributes:
        low: Where it begins. Smaller values have the first shade.
        decades: Decades of one step. Values beyond the last step have the last shade.
        label: What the values are.
    """

    low: float
    decades: float
    label: str

    @classmethod
    def spanning(cls, low: float, high: float, label: str) -> "Shades":
        """Return a scale from the power of ten below ``low`` to ``high``, or beyond it.

        It has at least four decades, so that values near ``low`` look alike.
        """
        begin = math.floor(math.log10(low))
        needed = math.log10(high) - begin if 0 < high < math.inf else 0.0
        step = next((step for step in _STEPS if step * NUM_SHADES >= needed), _STEPS[-1])
        return cls(10.0**begin, step, label)

    def of(self, values: Values) -> npt.NDArray[np.int8]:
        """Return the number of each value's shade: ``_SAME`` for 0, ``_NOTHING`` for NaN."""
        wide = np.asarray(values, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.floor(np.log10(wide / self.low) / self.decades + 1e-9)
        steps = np.nan_to_num(steps, nan=0.0).clip(0, NUM_SHADES - 1)
        steps = np.where(wide == 0, _SAME, steps)
        shades: npt.NDArray[np.int8] = np.where(np.isnan(wide), _NOTHING, steps).astype(np.int8)
        return shades

    def legend(self, width: float) -> tuple[list[Markup], float]:
        """Return the elements of the legend, and its height."""
        parts = [drawing.text(self.label, 0, _LINE)]
        top, each = _LINE + _SPACE, width / NUM_SHADES
        for shade in range(NUM_SHADES):
            parts.append(box(shade * each, top, each, _BOX, f"h{shade}"))
        end = 0.0
        for step in range(1, NUM_SHADES):
            power = math.log10(self.low) + step * self.decades
            x, written = step * each, power_text(round(power))
            half = drawing.text_width(written) / 2
            if abs(power - round(power)) < 1e-6 and x - half >= end:
                parts.append(drawing.text(written, x, top + _BOX + 14, "muted middle"))
                end = x + half + _SPACE
        return parts, top + _BOX + _LINE


def cells(shades: npt.NDArray[np.int8], x: float, y: float, width: float, height: float) -> Markup:
    """Return a matrix of shades as cells that fill a rectangle.

    Neighbors of one shade in a row are one line, and all lines of a shade are one path. So the
    drawing stays small.
    """
    rows, columns = shades.shape
    each_x, each_y = width / columns, height / rows
    lines: dict[int, list[str]] = {}
    for row in range(rows):
        at = f"{y + (row + 0.5) * each_y:.1f}"
        begin = 0
        for shade, same in groupby(shades[row].tolist()):
            end = begin + len(list(same))
            if shade != _NOTHING:
                left, right = (f"{x + i * each_x:.1f}" for i in (begin, end))
                lines.setdefault(shade, []).append(f"M{left} {at}H{right}")
            begin = end
    # Coordinates are rounded, and there must be no gap between rows
    thick = {"stroke-width": each_y + 0.2}
    paths = [
        element("path", d="".join(own), class_=f"cells {_class(shade)}", **thick)
        for shade, own in sorted(lines.items())
    ]
    return Markup("\n").join(paths)


def box(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> Markup:
    """Return a rectangle, of which a browser shows ``title`` beside the pointer."""
    inside = element("title", title) if title else ""
    kind = class_ if class_ == "hover" else f"box {class_}"
    return element("rect", inside, x=x, y=y, width=width, height=height, class_=kind)


def pooled(values: Values, most: int) -> Values:
    """Return a matrix of at most ``most`` rows and columns, each the largest of its neighbors.

    A cell is NaN only if all of its values are.
    """
    rows, columns = values.shape
    each = max(1, -(-max(rows, columns) // most))
    if each == 1:
        return values
    padded = np.full((-(-rows // each) * each, -(-columns // each) * each), np.nan, values.dtype)
    padded[:rows, :columns] = values
    blocks = padded.reshape(padded.shape[0] // each, each, padded.shape[1] // each, each)
    # fmax takes the number where one of two is NaN
    largest: Values = np.fmax.reduce(np.fmax.reduce(blocks, axis=3), axis=1)
    return largest


def power_text(power: int) -> str:
    """Return how a power of ten is written."""
    return f"{10.0**power:g}" if -4 < power < 4 else f"1e{power}"


def _class(shade: int) -> str:
    return "same" if shade == _SAME else f"h{shade}"
