"""A chart of named rows below each other: stacked bars or points along one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from idefics2_engine.charts import drawing
from idefics2_engine.charts.axis import Axis, tick_text
from idefics2_engine.charts.drawing import Drawing, Key, Mark, element

_LABEL = 16.0
_BAR = 13.0
_LANE = 8.0
_SPACE = 12.0
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
    """A point of a row. Points of one lane are on one line."""

    value: float
    mark: Mark
    title: str
    lane: int = 0


@dataclass(frozen=True)
class ChartRow:
    """A row: a label and where it is from, above its bars or dots, and a remark at the end."""

    label: str
    origin: str = ""
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

    def draw(self, width: float) -> Drawing:
        """Draw it ``width`` units wide."""
        parts, top = drawing.legend(self.keys, width)
        num_labels = 1 if all(_is_short(row, width) for row in self.rows) else 2
        lanes = max((dot.lane for row in self.rows for dot in row.dots), default=0)
        marks = num_labels * _LABEL + 2
        height = marks + max(_BAR, (lanes + 1) * _LANE) + _SPACE
        bottom, end = top + len(self.rows) * height, 0.0

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
            y = top + index * height
            parts += _label(row, y, width, num_labels)
            begin = 0.0
            for bar in row.bars:
                left, right = place(begin), place(begin + bar.value)
                at = left, y + marks, right - left, _BAR
                parts.append(drawing.bar(*at, bar.color, bar.title))
                begin += bar.value
            for dot in row.dots:
                at_y = y + marks + dot.lane * _LANE + 5
                parts.append(drawing.mark(dot.mark, place(dot.value), at_y, dot.title))
        return Drawing(parts, width, bottom + _BOTTOM, self.heading)


def _is_short(row: ChartRow, width: float) -> bool:
    """Return whether label, origin and remark fit on one line."""
    texts = [text for text in (row.label, row.origin, row.remark) if text]
    return sum(map(drawing.text_width, texts)) + _GAP * len(texts) <= width - 2 * _SIDE


def _label(row: ChartRow, y: float, width: float, num_lines: int) -> list[Markup]:
    first, second = row.label, ""
    if row.origin and num_lines == 1:
        first = Markup("{}{}").format(row.label, element("tspan", row.origin, dx=8, class_="muted"))
    elif row.origin:
        second = row.origin
    parts = [drawing.text(first, _SIDE, y + 13, "on-lines")]
    if second:
        parts.append(drawing.text(second, _SIDE, y + _LABEL + 13, "muted on-lines"))
    if row.remark:
        parts.append(drawing.text(row.remark, width - _SIDE, y + 13, "muted end on-lines"))
    return parts
