"""A heat map over pictures: panels side by side, each with cells that lie on one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from idefics2_engine.charts import drawing
from idefics2_engine.charts.drawing import Drawing, element
from idefics2_engine.charts.shades import Shades, Values, box, cells

_SPACE = 10.0
_LINE = 15.0
_MARK = 4.0
_BOTTOM = 8.0
# A taller picture is drawn narrower
_MOST_ASPECT = 1.4
# Drawings below this width are for phones
_NARROW = 480.0

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, as shares of its sides."""


@dataclass(frozen=True)
class Overlay:
    """Values of the cells of a part of a picture, rows by columns. NaN is no value."""

    place: Box
    values: Values


@dataclass(frozen=True)
class Panel:
    """One picture with cells on it.

    Attributes:
        label: A text above it, in lines as wide as the panel.
        remark: A line below the label.
        overlays: The cells.
        is_marked: Whether there is a line above it.
    """

    label: str
    remark: str
    overlays: Sequence[Overlay]
    is_marked: bool = False


@dataclass(frozen=True)
class PictureMap:
    """Panels of one picture.

    Attributes:
        heading: Its heading, which is not part of the drawing.
        source: The picture as a data URI. ``None`` if it is not known.
        aspect: Its height divided by its width.
        panels: Groups of panels. Those of a group are side by side on a phone, and below each other
            where there is more room.
        shades: The scale.
        note: How it is read.
        mark: What the line above a panel means.

    Raises:
        ValueError: The source is no data.
    """

    heading: str
    source: str | None
    aspect: float
    panels: Sequence[Sequence[Panel]]
    shades: Shades
    note: str = ""
    mark: str = ""

    def __post_init__(self) -> None:
        """Check that the drawing will need no network."""
        if self.source is not None and not self.source.startswith("data:image/jpeg;base64,"):
            raise ValueError("source must be the data URI of a JPEG file, got another text")

    def draw(self, width: float) -> Drawing:
        """Draw it ``width`` units wide."""
        parts, top = self.shades.legend(width)
        panels = [panel for group in self.panels for panel in group]
        if any(panel.is_marked for panel in panels):
            parts += [box(0, top + 5, 12, _MARK, "c1"), drawing.text(self.mark, 18, top + 12)]
            top += _LINE
        in_line = 2
        if width >= _NARROW:
            in_line = max(3, len(self.panels))
            panels = [panel for same in zip(*self.panels, strict=True) for panel in same]
        each = (width - (in_line - 1) * _SPACE) / in_line
        shown = min(each, each * _MOST_ASPECT / self.aspect)
        labels = max(len(drawing.wrapped(panel.label, each)) for panel in panels)
        lines = labels + 1
        height = lines * _LINE + 2 * _MARK + shown * self.aspect + _SPACE
        for index, panel in enumerate(panels):
            row, column = divmod(index, in_line)
            x, y = column * (each + _SPACE), top + row * height
            own = drawing.wrapped(panel.label, each)
            parts += [drawing.text(line, x, y + (i + 1) * _LINE) for i, line in enumerate(own)]
            remark = drawing.shortened(panel.remark, each)
            parts.append(drawing.text(remark, x, y + (len(own) + 1) * _LINE, "muted"))
            parts += self._picture(panel, x, y + lines * _LINE + _MARK, shown)
        rows = -(-len(panels) // in_line)
        return Drawing(parts, width, top + rows * height + _BOTTOM, self.heading)

    def _picture(self, panel: Panel, x: float, y: float, width: float) -> list[Markup]:
        height = width * self.aspect
        parts = []
        if panel.is_marked:
            parts.append(box(x, y, width, _MARK, "c1"))
        y += _MARK + 1
        if self.source is not None:
            place = {"x": x, "y": y, "width": width, "height": height}
            stretched = {"preserveAspectRatio": "none"}
            parts.append(element("image", href=self.source, **place, **stretched))
        drawn = [
            cells(
                self.shades.of(overlay.values),
                x + overlay.place[0] * width,
                y + overlay.place[1] * height,
                (overlay.place[2] - overlay.place[0]) * width,
                (overlay.place[3] - overlay.place[1]) * height,
            )
            for overlay in panel.overlays
        ]
        parts.append(element("g", *drawn, class_="over"))
        inside = {"x": x + 0.5, "y": y + 0.5, "width": width - 1, "height": height - 1}
        parts.append(element("rect", **inside, class_="frame"))
        return parts
