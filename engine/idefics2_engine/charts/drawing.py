"""Elements of SVG, in which everything is escaped, and the style of all charts."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from markupsafe import Markup, escape

FONT = 12.0
"""Height of text, in units of a drawing."""

NUM_COLORS = 8

STYLE = Markup("""
.chart {
  --c-page: #ffffff; --c-text: #1b1f24; --c-muted: #5f6873; --c-grid: #e3e6eb;
  --c-0: #2a78d6; --c-1: #d9480f; --c-2: #0f8a5f; --c-3: #8250df; --c-4: #b7791f; --c-5: #d13f77;
  --c-6: #0b7f8c; --c-7: #5c7a12;
  --h-0: #fdf0c4; --h-1: #fce19e; --h-2: #face7d; --h-3: #f8b660; --h-4: #f39853; --h-5: #eb794a;
  --h-6: #dc5848; --h-7: #c63e4e; --h-8: #ab2957; --h-9: #891e5a; --h-10: #651755; --h-11: #40114b;
}
@media (prefers-color-scheme: dark) {
  .chart {
    --c-page: #1a1f26; --c-text: #e4e8ee; --c-muted: #98a2af; --c-grid: #2e353f;
    --c-0: #5a9df0; --c-1: #ff8a4c; --c-2: #3ac28e; --c-3: #b291ff; --c-4: #e0b04a; --c-5: #f47ba6;
    --c-6: #45c1cf; --c-7: #a8c957;
    --h-0: #352a63; --h-1: #4e2b74; --h-2: #6a2d7e; --h-3: #8a3082; --h-4: #a9387d; --h-5: #c64473;
    --h-6: #df5864; --h-7: #ef7557; --h-8: #f9964f; --h-9: #fbb758; --h-10: #fcd67b; --h-11: #fdf4b2;
  }
}
.chart text {
  fill: var(--c-text);
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
.chart .page { fill: var(--c-page); }
.chart .muted { fill: var(--c-muted); }
.chart .on-lines { paint-order: stroke; stroke: var(--c-page); stroke-width: 4px; }
.chart .end { text-anchor: end; }
.chart .middle { text-anchor: middle; }
.chart .grid { stroke: var(--c-grid); }
.chart .axis { stroke: var(--c-muted); }
.chart .line { fill: none; stroke: currentcolor; stroke-width: 1.75; }
.chart .dashed { stroke-dasharray: 4 4; }
.chart .mark { fill: currentcolor; stroke: var(--c-page); stroke-width: 0.75; }
.chart .hollow { fill: none; stroke: currentcolor; stroke-width: 1.5; }
.chart .tick { fill: var(--c-text); stroke: var(--c-page); stroke-width: 1; }
.chart .bar { fill: currentcolor; stroke: var(--c-page); stroke-width: 1; }
.chart .cells { fill: none; stroke: currentcolor; shape-rendering: crispedges; }
.chart .box { fill: currentcolor; }
.chart .over { opacity: 0.7; }
.chart .frame { fill: none; stroke: var(--c-muted); stroke-width: 0.75; }
.chart .hover { fill: transparent; }
.chart .plain { color: var(--c-muted); }
.chart .same { color: var(--c-grid); }
.chart .c0 { color: var(--c-0); } .chart .c1 { color: var(--c-1); }
.chart .c2 { color: var(--c-2); } .chart .c3 { color: var(--c-3); }
.chart .c4 { color: var(--c-4); } .chart .c5 { color: var(--c-5); }
.chart .c6 { color: var(--c-6); } .chart .c7 { color: var(--c-7); }
.chart .h0 { color: var(--h-0); } .chart .h1 { color: var(--h-1); }
.chart .h2 { color: var(--h-2); } .chart .h3 { color: var(--h-3); }
.chart .h4 { color: var(--h-4); } .chart .h5 { color: var(--h-5); }
.chart .h6 { color: var(--h-6); } .chart .h7 { color: var(--h-7); }
.chart .h8 { color: var(--h-8); } .chart .h9 { color: var(--h-9); }
.chart .h10 { color: var(--h-10); } .chart .h11 { color: var(--h-11); }
""")
"""Rules for all charts of a page or a file."""

_LINE = 18.0
_SIDE = 8.0
# Around a drawing that is a file
_MARGIN = 14.0
# The average width of a character as a share of its height
_CHARACTER = 0.56
_KEPT_CONTROLS = "\t\n"


@dataclass(frozen=True)
class Drawing:
    """A chart that was drawn at a width.

    Attributes:
        parts: Its elements.
        width: Its width in units, of which a character of text is 12 high.
        height: Its height.
        name: What is said in its place.
    """

    parts: Sequence[Markup]
    width: float
    height: float
    name: str

    def svg(self) -> Markup:
        """Return the drawing for a page with ``STYLE``, as wide as its place there."""
        return _svg(self.parts, (0, 0, self.width, self.height), self.name)


class Chart(Protocol):
    """A chart."""

    @property
    def heading(self) -> str:
        """Its heading, which is not part of the drawing."""

    @property
    def note(self) -> str:
        """How it is read."""

    def draw(self, width: float) -> Drawing:
        """Draw it ``width`` units wide."""


@dataclass(frozen=True)
class Mark:
    """How a point looks.

    Attributes:
        color: The number of a color, of which there are ``NUM_COLORS``. More begin again. ``None``
            is the color of muted text.
        shape: Its shape. A tick is a line across a bar, in the color of text.
        is_hollow: Whether only its outline is drawn.
    """

    color: int | None = 0
    shape: Literal["circle", "square", "diamond", "tick"] = "circle"
    is_hollow: bool = False


@dataclass(frozen=True)
class Line:
    """How a line looks; the colors are those of ``Mark``."""

    color: int | None = 0
    is_dashed: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend: signs, which are drawn over each other, and what they mean."""

    signs: tuple[Mark | Line, ...]
    text: str


def element(tag: str, *content: str, **attributes: str | float) -> Markup:
    """Return an SVG element; ``class_`` is the attribute ``class``."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_"), _number_text(value))
        for name, value in attributes.items()
    )
    inside = Markup("").join(escape(allowed(part)) for part in content)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, written, inside)


def text(content: str, x: float, y: float, class_: str = "") -> Markup:
    """Return a text whose baseline begins at (x, y)."""
    return element("text", content, x=x, y=y, **({"class_": class_} if class_ else {}))


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Iterable[tuple[float, float]], look: Line) -> Markup:
    """Return a line through ``points``."""
    places = " ".join(f"{_number_text(x)},{_number_text(y)}" for x, y in points)
    dashes = " dashed" * look.is_dashed
    return element("polyline", points=places, class_=f"line {color_class(look.color)}{dashes}")


def mark(look: Mark, x: float, y: float, title: str = "") -> Markup:
    """Return a mark at (x, y). A browser shows ``title`` beside the pointer."""
    kind = "hollow" if look.is_hollow else "mark"
    class_ = f"{kind} {color_class(look.color)}"
    inside = element("title", title) if title else ""
    if look.shape == "circle":
        return element("circle", inside, cx=x, cy=y, r=4, class_=class_)
    if look.shape == "square":
        return element("rect", inside, x=x - 3.5, y=y - 3.5, width=7, height=7, class_=class_)
    if look.shape == "tick":
        return element("rect", inside, x=x - 1.5, y=y - 7, width=3, height=16, class_="tick")
    outline = f"M{_number_text(x)} {_number_text(y - 5)}l5 5l-5 5l-5 -5z"
    return element("path", inside, d=outline, class_=class_)


def bar(x: float, y: float, width: float, height: float, color: int | None, title: str) -> Markup:
    """Return a bar."""
    class_ = f"bar {color_class(color)}"
    inside = element("title", title)
    return element("rect", inside, x=x, y=y, width=width, height=height, class_=class_)


def color_class(color: int | None) -> str:
    """Return the class of a color."""
    return "plain" if color is None else f"c{color % NUM_COLORS}"


def text_width(content: str) -> float:
    """Return about the width of a text."""
    return _CHARACTER * FONT * len(content)


def shortened(content: str, width: float) -> str:
    """Return a text that is at most about ``width`` wide, cut with an ellipsis if needed."""
    most = max(1, int(width / (_CHARACTER * FONT)))
    return content if len(content) <= most else f"{content[: most - 1]}…"


def wrapped(content: str, width: float) -> list[str]:
    """Return the lines of a text that are at most about ``width`` wide each."""
    return textwrap.wrap(content, max(1, int(width / (_CHARACTER * FONT)))) or [""]


def legend(keys: Iterable[Key], width: float) -> tuple[list[Markup], float]:
    """Return the elements of a legend of at most ``width``, and its height."""
    parts: list[Markup] = []
    x, y = 0.0, _LINE
    for key in keys:
        needed = 22 + text_width(key.text)
        if x and x + needed > width:
            x, y = 0.0, y + _LINE
        for sign in key.signs:
            if isinstance(sign, Mark):
                parts.append(mark(sign, x + 9, y - 4))
            else:
                parts.append(polyline([(x, y - 4), (x + 18, y - 4)], sign))
        parts.append(text(key.text, x + 22, y))
        x += needed + 14
    return parts, y + _SIDE if parts else 0.0


def svg_file(chart: Chart, width: float = 640) -> bytes:
    """Return ``chart`` as an SVG file, light or dark as the reader's system.

    It has a background, because the place where it is shown may be the other way round.
    """
    drawn = chart.draw(width)
    corner, size = (-_MARGIN, -_MARGIN), (drawn.width + 2 * _MARGIN, drawn.height + 2 * _MARGIN)
    page = element(
        "rect", x=corner[0], y=corner[1], width=size[0], height=size[1], rx=_SIDE, class_="page"
    )
    inside = (element("style", STYLE), page, *drawn.parts)
    file = _svg(inside, (*corner, *size), drawn.name, xmlns="http://www.w3.org/2000/svg")
    return f"{file}\n".encode()


def _svg(parts: Iterable[Markup], box: tuple[float, ...], name: str, **attributes: str) -> Markup:
    names = {"class": "chart", "viewBox": " ".join(map(_number_text, box)), "role": "img"}
    return element("svg", Markup("\n").join(parts), **attributes, **names, **{"aria-label": name})


def allowed(content: str) -> str:
    """Return ``content``, in which characters that neither HTML nor XML can have are U+FFFD."""
    replaced = content.translate(_ALLOWED)
    return Markup(replaced) if isinstance(content, Markup) else replaced


class _Allowed(dict[int, int]):
    """A table for ``str.translate``: controls and halves of surrogate pairs become U+FFFD."""

    def __missing__(self, code: int) -> int:
        is_control = (code < 32 and chr(code) not in _KEPT_CONTROLS) or 127 <= code < 160
        is_forbidden = 0xD800 <= code < 0xE000 or 0xFFFE <= code <= 0xFFFF
        self[code] = 0xFFFD if is_control or is_forbidden else code
        return self[code]


_ALLOWED = _Allowed()


def _number_text(value: str | float) -> str:
    if isinstance(value, str):
        return allowed(value)
    return f"{value:.1f}".removesuffix(".0")
