"""The page of figures and tables: it is escaped, and needs no network and no scripts."""

from html.parser import HTMLParser

import pytest

from idefics2_engine.report_page import (
    Cell,
    Column,
    Figure,
    Page,
    Picture,
    Table,
    TableRow,
    Text,
    render_page,
)

EVIL = "<script>alert('\"&amp;')</script>"
PICTURE = Picture("data:image/png;base64,AAAA", 4, 3, EVIL)
COLUMNS = [Column("Row", "label"), Column("Pictures", "picture"), Column(EVIL)]


class Parsed(HTMLParser):
    """The elements of a page, with their attributes, and its texts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page.decode())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


def page(*cells: Cell) -> bytes:
    table = Table(EVIL, COLUMNS, [TableRow(cells)], EVIL)
    figures = [Figure(EVIL, EVIL, EVIL, is_bad=True)]
    return render_page(Page(EVIL, EVIL, figures, [table], {"name": f'"{EVIL}'}))


def test_everything_is_escaped() -> None:
    parsed = Parsed(page([Text(EVIL, "strong")], [PICTURE, Text(EVIL)], [Text(EVIL), Text("b")]))
    assert "script" not in [tag for tag, _ in parsed.elements]
    # Two titles and a line, three of the figure, heading, note, column and three cells
    assert parsed.texts.count(EVIL) == 12
    attributes = [value for _, own in parsed.elements for value in own.values()]
    assert attributes.count(EVIL) == 2
    assert f'"{EVIL}' in attributes


def test_page_needs_nothing_else() -> None:
    content = page([], [PICTURE], [])
    parsed = Parsed(content)
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"script", "link", "iframe", "object"})
    sources = [own["src"] for tag, own in parsed.elements if tag == "img"]
    assert sources == ["data:image/png;base64,AAAA"]
    assert not [own for _, own in parsed.elements if {"href", "srcset", "style"} & own.keys()]
    assert not [name for _, own in parsed.elements for name in own if name.startswith("on")]
    assert b"url(" not in content
    assert b"@import" not in content
    policy = next(own["content"] for _, own in parsed.elements if "http-equiv" in own)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_empty_page_has_neither_figures_nor_tables() -> None:
    parsed = Parsed(render_page(Page("empty")))
    assert parsed.texts.count("empty") == 2
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"dl", "table", "p"})


def test_characters_that_html_cannot_have_are_replaced() -> None:
    content = page([Text("a\x00b\x1b\ud800\x85\tc\nd é \U0001f600")], [], [])
    assert "a\ufffdb\ufffd\ufffd\ufffd\tc\nd é \U0001f600" in content.decode()


def test_bad_rows_are_marked() -> None:
    rows = [
        TableRow([[Text("good")]]),
        TableRow([[Text("bad")]], is_bad=True),
    ]
    parsed = Parsed(render_page(Page("t", tables=[Table("h", [Column("c")], rows)])))
    assert [own for tag, own in parsed.elements if tag == "tr"] == [{}, {}, {"class": "bad"}]


def test_pictures_are_data() -> None:
    for source in ("https://example.org/a.png", "a.png", "data:image/svg+xml;base64,AAAA"):
        with pytest.raises(ValueError, match="source must begin with"):
            Picture(source, 1, 1)


def test_rows_have_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="must have 3 cells, got 1"):
        Table("", COLUMNS, [TableRow([[]])])
