"""A chart with two axes of numbers: points and lines."""

from collections.abc import Sequence
from dataclasses import dataclass

from idefics2_engine.charts import drawing
from idefics2_engine.charts.axis import Axis, tick_text
from idefics2_engine.charts.drawing import Drawing, Key, Line, Mark

_RIGHT = 14.0
_BOTTOM = 38.0
_SPACE = 8.0
# Least units between two texts of an axis
_GAP = 10.0


@dataclass(frozen=True)
class Point:
    """A point, with what a browser shows beside the pointer."""

    x: float
    y: float
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one look, with a line through them if ``line`` is given."""

    points: Sequence[Point]
    mark: Mark | None = None
    line: Line | None = None


@dataclass(frozen=True)
class Plot:
    """A chart of ``series``, the last of which is on top.

    Attributes:
        heading: Its heading, which is not part of the drawing.
        x: The horizontal axis.
        y: The vertical axis.
        series: What is drawn.
        keys: The legend.
        note: How it is read.
    """

    heading: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    keys: Sequence[Key] = ()
    note: str = ""

    def draw(self, width: float) -> Drawing:
        """Draw it ``width`` units wide."""
        parts, used = drawing.legend(self.keys, width)
        top = used + drawing.FONT + 2 * _SPACE
        left = max(map(drawing.text_width, map(tick_text, self.y.ticks)), default=0.0) + _SPACE
        right, height = width - _RIGHT, max(240.0, 0.52 * width)
        bottom = top + height

        def place(x: float, y: float) -> tuple[float, float]:
            across, up = self.x.share(x), self.y.share(y)
            return left + across * (right - left), bottom - up * height

        for tick in self.y.ticks:
            y = place(self.x.low, tick)[1]
            parts.append(drawing.line(left, y, right, y, "grid"))
            parts.append(drawing.text(tick_text(tick), left - _SPACE / 2, y + 4, "muted end"))
        end = 0.0
        for tick in self.x.ticks:
            x, written = place(tick, self.y.low)[0], tick_text(tick)
            parts.append(drawing.line(x, top, x, bottom, "grid"))
            half = drawing.text_width(written) / 2
            if x - half >= end:
                parts.append(drawing.text(written, x, bottom + 16, "muted middle"))
                end = x + half + _GAP
        parts.append(drawing.line(left, bottom, right, bottom, "axis"))
        parts.append(drawing.text(self.y.label, 0, top - _SPACE, "muted"))
        parts.append(drawing.text(self.x.label, right, bottom + 33, "muted end"))
        for series in self.series:
            places = [place(point.x, point.y) for point in series.points]
            if series.line is not None:
                parts.append(drawing.polyline(places, series.line))
            if series.mark is not None:
                parts += [
                    drawing.mark(series.mark, *at, point.title)
                    for at, point in zip(places, series.points, strict=True)
                ]
        return Drawing(parts, width, bottom + _BOTTOM, self.heading)
