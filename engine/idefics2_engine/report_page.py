"""One HTML page of figures, charts and tables, which needs no network and no scripts.

``report_page.html`` is its template. Everything that is shown is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined, Template

from idefics2_engine.charts.drawing import STYLE, Chart, allowed

_PICTURES = ("data:image/jpeg;base64,", "data:image/png;base64,", "data:image/webp;base64,")
# Each chart is drawn for a screen and for a phone, because a drawing's text shrinks with it
_WIDTHS = {"screen": 640, "phone": 330}


@dataclass(frozen=True)
class Figure:
    """A number above the tables, as text, with what it is and a remark."""

    label: str
    value: str
    note: str = ""
    is_bad: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph of a cell.

    Attributes:
        text: What is shown, with its line breaks.
        style: Some of ``muted``, ``strong``, ``error`` and ``badge``, with spaces between them.
    """

    text: str
    style: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture of a cell, as a data URI.

    Attributes:
        source: The URI of a JPEG, PNG or WebP file.
        width: Its pixels.
        height: Its rows.
        alt: What is said in its place.

    Raises:
        ValueError: The source is something else.
    """

    source: str
    width: int
    height: int
    alt: str = ""

    def __post_init__(self) -> None:
        """Check that the page will need no network."""
        if not self.source.startswith(_PICTURES):
            raise ValueError(f"source must begin with one of {_PICTURES}, got another text")


Cell = Sequence[Text | Picture]
"""The parts of a cell, one below the other. Pictures are side by side."""


@dataclass(frozen=True)
class Column:
    """A column; its kind determines how its cells are laid out. A name is not broken into lines."""

    name: str
    kind: Literal["text", "label", "name", "number", "picture"] = "text"


@dataclass(frozen=True)
class TableRow:
    """A row with a cell for each column; a bad one is highlighted."""

    cells: Sequence[Cell]
    is_bad: bool = False


@dataclass(frozen=True)
class Table:
    """A table, which a narrow screen shows as a list if it has more than two columns.

    A folded one is shown when its heading is pressed.

    Raises:
        ValueError: A row has more or fewer cells than there are columns.
    """

    heading: str
    columns: Sequence[Column]
    rows: Sequence[TableRow]
    note: str = ""
    is_folded: bool = False

    def __post_init__(self) -> None:
        """Check the number of cells."""
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"a row must have {len(self.columns)} cells, got {len(row.cells)}")


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its title.
        subtitle: A line below the title.
        figures: Numbers above the tables.
        tables: Tables, one below the other.
        marks: Names and contents of ``meta`` elements at the beginning of the file.
        charts: Charts between the figures and the tables.
        first_tables: Tables between the figures and the charts.
    """

    title: str
    subtitle: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    first_tables: Sequence[Table] = ()


def render_page(page: Page) -> bytes:
    """Return the HTML of a page; characters that HTML cannot have become U+FFFD."""
    drawn = [
        (chart, {on: chart.draw(width).svg() for on, width in _WIDTHS.items()})
        for chart in page.charts
    ]
    return allowed(_template().render(page=page, drawn=drawn, style=STYLE)).encode()


@cache
def _template() -> Template:
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)
