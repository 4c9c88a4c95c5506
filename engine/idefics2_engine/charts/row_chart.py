"""A chart of named rows below each other: stacked bars or points along one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from idefics2_engine.charts import drawing
from idefics2_engine.charts.axis import Axis, tick_text
from idefics2_engine.charts.drawing import Key, Mark

_ROW = 36.0
_BAR = 13.0
_SIDE = 14.0
_BOTTOM = 38.0
_GAP = 10.0


@dataclass(frozen=True)
class Bar:
    """A part of a row's bar, with what a browser shows beside the pointer."""

    value: float
    color: int | None
    title: str


@dataclass(frozen=True)
class Dot:
    """A point of a row."""

    value: float
    mark: Mark
    title: str


@dataclass(frozen=True)
class ChartRow:
    """A row: a label above its bars or dots, and a remark at the end of the label's line."""

    label: str
    bars: Sequence[Bar] = ()
    dots: Sequence[Dot] = ()
    remark: str = ""


@dataclass(frozen=True)
class RowChart:
    """A chart of rows.

    Attributes:
        heading: Its heading, which is not part of the drawing.
        axis: The axis of all rows.
        rows: The rows.
        keys: The legend.
        note: How it is read.
        reference: A value with a line through all rows, if any.
    """

    heading: str
    axis: Axis
    rows: Sequence[ChartRow]
    keys: Sequence[Key] = ()
    note: str = ""
    reference: float | None = None

    def svg(self, width: float) -> Markup:
        """Draw it ``width`` units wide."""
        parts, top = drawing.legend(self.keys, width)
        bottom, end = top + len(self.rows) * _ROW, 0.0

        def place(value: float) -> float:
            return _SIDE + self.axis.share(value) * (width - 2 * _SIDE)

        for tick in self.axis.ticks:
            x, written = place(tick), tick_text(tick)
            parts.append(drawing.line(x, top, x, bottom, "grid"))
            half = drawing.text_width(written) / 2
            if x - half >= end:
                parts.append(drawing.text(written, x, bottom + 16, "muted middle"))
                end = x + half + _GAP
        if self.reference is not None:
            x = place(self.reference)
            parts.append(drawing.line(x, top, x, bottom, "axis"))
        parts.append(drawing.line(_SIDE, bottom, width - _SIDE, bottom, "axis"))
        parts.append(drawing.text(self.axis.label, width - _SIDE, bottom + 33, "muted end"))
        for index, row in enumerate(self.rows):
            y = top + index * _ROW
            parts.append(drawing.text(row.label, _SIDE, y + 13))
            if row.remark:
                parts.append(drawing.text(row.remark, width - _SIDE, y + 13, "muted end"))
            begin = 0.0
            for bar in row.bars:
                left, right = place(begin), place(begin + bar.value)
                size = right - left
                parts.append(drawing.bar(left, y + 18, size, _BAR, bar.color, bar.title))
                begin += bar.value
            parts += [
                drawing.mark(dot.mark, place(dot.value), y + 25, dot.title) for dot in row.dots
            ]
        return drawing.drawing(parts, width, bottom + _BOTTOM, self.heading)
