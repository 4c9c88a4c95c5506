"""A heat map: named rows below each other, columns side by side, a shade for each value."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from idefics2_engine.charts import drawing
from idefics2_engine.charts.drawing import Drawing
from idefics2_engine.charts.shades import Shades, Values, box, cells

_ROW = 15.0
_LINE = 18.0
_MARK = 4.0
_GAP = 6.0
_MOST_LABEL = 0.36
_BOTTOM = 8.0


@dataclass(frozen=True)
class HeatRow:
    """A row: its label, which is cut if it is too long, and what is shown beside the pointer."""

    label: str
    title: str


@dataclass(frozen=True)
class HeatColumn:
    """A column.

    Attributes:
        label: Its name.
        short: The name on a drawing where not all labels fit. Some are then left out.
        title: What a browser shows beside the pointer.
        is_marked: Whether there is a line above it.
    """

    label: str
    short: str
    title: str
    is_marked: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A heat map.

    Attributes:
        heading: Its heading, which is not part of the drawing.
        rows: The rows.
        columns: The columns.
        values: Values of rows by columns. NaN is no value.
        shades: The scale.
        note: How it is read.
        mark: What the line above a column means.
    """

    heading: str
    rows: Sequence[HeatRow]
    columns: Sequence[HeatColumn]
    values: Values
    shades: Shades
    note: str = ""
    mark: str = ""

    def draw(self, width: float) -> Drawing:
        """Draw it ``width`` units wide."""
        parts, top = self.shades.legend(width)
        keys, top = _keys(self, top)
        longest = max(drawing.text_width(row.label) for row in self.rows)
        left = min(longest + 2 * _GAP, _MOST_LABEL * width)
        each = (width - left) / len(self.columns)
        top += _LINE
        height = _ROW * len(self.rows)
        parts += [*keys, *_column_labels(self.columns, left, each, top - _GAP)]
        parts.append(cells(self.shades.of(self.values), left, top, width - left, height))
        for index, row in enumerate(self.rows):
            at = 0.0, top + (index + 0.75) * _ROW
            label = drawing.text(drawing.shortened(row.label, left - _GAP), *at)
            parts.append(drawing.element("g", label, drawing.element("title", row.title)))
        for index, column in enumerate(self.columns):
            x = left + index * each
            if column.is_marked:
                parts.append(box(x, top - _MARK - 1, each, _MARK, "c1"))
            parts.append(box(x, top, each, height, "hover", column.title))
        return Drawing(parts, width, top + height + _BOTTOM, self.heading)


def _keys(chart: HeatMap, top: float) -> tuple[list[Markup], float]:
    """Return what the line and cells without a shade mean, and the next free height."""
    parts: list[Markup] = []
    x, y = 0.0, top + 12
    if chart.mark and any(column.is_marked for column in chart.columns):
        parts += [box(x, y - 7, 12, _MARK, "c1"), drawing.text(chart.mark, x + 18, y)]
        x += 18 + drawing.text_width(chart.mark) + 14
    if (chart.values == 0).any():
        parts += [box(x, y - 10, 12, 12, "same"), drawing.text("equal", x + 18, y)]
        x += 18 + drawing.text_width("equal") + 14
    if np.isnan(chart.values).any():
        parts += [box(x, y - 10, 12, 12, "frame"), drawing.text("no value", x + 18, y)]
    return parts, top + _LINE if parts else top


def _column_labels(
    columns: Sequence[HeatColumn], left: float, each: float, y: float
) -> list[Markup]:
    """Return labels above the columns, or short ones where they do not overlap."""
    if all(drawing.text_width(column.label) + _GAP <= each for column in columns):
        labels = [column.label for column in columns]
    else:
        labels = [column.short for column in columns]
    # The last one is written in any case
    last = left + (len(columns) - 0.5) * each
    limit = last - drawing.text_width(labels[-1]) / 2 - _GAP
    parts = [drawing.text(labels[-1], last, y, "muted middle")]
    end = 0.0
    for index, label in enumerate(labels[:-1]):
        x, half = left + (index + 0.5) * each, drawing.text_width(label) / 2
        if x - half >= end and x + half <= limit:
            parts.append(drawing.text(label, x, y, "muted middle"))
            end = x + half + _GAP
    return parts
