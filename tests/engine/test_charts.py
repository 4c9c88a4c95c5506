"""Charts: places of values, escaped text, no fixed width, light and dark."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import cast
from xml.etree import ElementTree

import numpy as np
import pytest

from idefics2_engine.charts.axis import Axis, linear_axis, log_axis
from idefics2_engine.charts.drawing import NUM_COLORS, STYLE, Chart, Key, Line, Mark, svg_file
from idefics2_engine.charts.heat_map import HeatColumn, HeatMap, HeatRow
from idefics2_engine.charts.picture_map import Overlay, Panel, PictureMap
from idefics2_engine.charts.plot import Plot, Point, Series
from idefics2_engine.charts.row_chart import Bar, ChartRow, Dot, RowChart
from idefics2_engine.charts.shades import NUM_SHADES, Shades
from idefics2_engine.report_page import Page, render_page

EVIL = "<script>alert('\"&amp;')</script>\x00\ud800\uffff"
CLEAN = EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\uffff", "\ufffd")
WIDTHS = (330, 640)


def plot(text: str = "", *points: Point) -> Plot:
    x, y = log_axis(text, [1.0, 1000.0]), linear_axis(text, [10.0])
    series = [
        Series([Point(1, 0, text), *points], Mark(1, is_hollow=True), Line(2, is_dashed=True))
    ]
    return Plot(text, x, y, series, [Key((Mark(1), Line(2)), text)], text)


def rows(text: str = "") -> RowChart:
    row = ChartRow(
        text, text, [Bar(2, 0, text), Bar(3, 1, text)], [Dot(1, Mark(3, "diamond"), text)]
    )
    axis = linear_axis(text, [5.0])
    return RowChart(text, axis, [row], [Key((Mark(0, "square"),), text)], text, reference=1.0)


def heat(text: str = "") -> HeatMap:
    shades = Shades.spanning(1e-7, 1.0, text)
    columns = [HeatColumn(text, text, text, is_marked=True)]
    values = np.array([[0.0], [0.1], [np.nan]])
    return HeatMap(text, [HeatRow(text, text)] * 3, columns, values, shades, text, text)


def pictures(text: str = "", source: str | None = None) -> PictureMap:
    shades = Shades.spanning(1e-7, 1.0, text)
    overlays = [Overlay((0, 0, 1, 1), np.array([[1e-5, 0.1]]))]
    panels = [[Panel(text, text, overlays, is_marked=True)]]
    return PictureMap(text, source, 0.5, panels, shades, text, text)


CHARTS: dict[str, Callable[[str], Chart]] = {
    "plot": plot,
    "rows": rows,
    "heat map": heat,
    "pictures": pictures,
}


def parsed(chart: Chart, width: float = 640) -> ElementTree.Element:
    return ElementTree.fromstring(svg_file(chart, width))


def elements(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return list(root.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_log_axis_is_even_in_powers() -> None:
    axis = log_axis("x", [1.0, 10000.0])
    assert axis.ticks == (1, 10, 100, 1000, 10000)
    places = [axis.share(tick) for tick in axis.ticks]
    gaps = [b - a for a, b in pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    assert 0 < places[0] < 1 - places[-1] + 0.1 < 0.2
    assert log_axis("x", [2.0, 30.0]).ticks == (2, 5, 10, 20)
    assert log_axis("x", [0.2, 50.0]).ticks == pytest.approx((0.2, 0.5, 1, 2, 5, 10, 20, 50))
    assert log_axis("x", [0.72, 1.16]).ticks == pytest.approx((0.6, 0.8, 1, 1.2, 1.4))
    assert log_axis("x", [1.0, 300.0], [1.0, 16.0]).ticks == (1, 16)


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(10.0, (0, 2, 4, 6, 8, 10)), (0.7, (0, 0.2, 0.4, 0.6, 0.8)), (35.7, (0, 10, 20, 30, 40))],
)
def test_linear_axis_begins_at_zero_and_has_round_ticks(
    most: float, ticks: tuple[float, ...]
) -> None:
    axis = linear_axis("x", [most / 2, most])
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.share(0), axis.share(axis.high)) == (0, 1)
    assert axis.high >= most


def test_axis_without_values_can_be_drawn() -> None:
    for axis in (linear_axis("x", []), log_axis("x", [])):
        assert isinstance(axis, Axis)
        assert axis.high > axis.low
        assert axis.ticks


def test_points_are_where_their_values_are() -> None:
    root = parsed(plot("", Point(1000, 10), Point(31.6228, 5)))
    own = [c for c in elements(root, "circle") if c.get("class") == "hollow c1"]
    low, high, middle = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in own]
    assert middle == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), abs=0.2)
    assert high[0] > low[0]
    assert high[1] < low[1]
    (line,) = [
        p
        for p in elements(root, "polyline")
        if "dashed" in p.get("class", "") and p.get("points", "").count(",") == 3
    ]
    assert line.get("points", "").split()[0] == f"{low[0]:.1f},{low[1]:.1f}".replace(".0", "")


def test_bars_are_as_long_as_their_values() -> None:
    bars = [r for r in elements(parsed(rows("a")), "rect") if "bar" in r.get("class", "")]
    widths = [float(bar.get("width", "")) for bar in bars]
    begins = [float(bar.get("x", "")) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(1.5, rel=1e-3)
    assert begins[1] == pytest.approx(begins[0] + widths[0], abs=0.11)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", CHARTS)
def test_text_is_escaped(kind: str, width: float) -> None:
    chart = CHARTS[kind](EVIL)
    root = parsed(chart, width)
    assert not elements(root, "script")
    assert kind == "pictures" or CLEAN in [title.text for title in elements(root, "title")]
    assert "<script" not in svg_file(chart, width).decode()
    assert root.get("aria-label") == CLEAN
    assert b"<script" not in render_page(Page("t", charts=[chart]))


@pytest.mark.parametrize("kind", CHARTS)
def test_drawing_has_no_fixed_width_and_nothing_from_outside(kind: str) -> None:
    chart = CHARTS[kind]("a")
    root = parsed(chart)
    assert {"width", "height"}.isdisjoint(root.keys())
    assert root.get("viewBox", "").startswith("-14 -14 668 ")
    content = svg_file(chart).decode()
    assert content.count("http") == 1
    assert "url(" not in content
    assert not re.search(r"\s(href|style|on\w+)=", content)


def test_every_color_has_a_light_and_a_dark_value() -> None:
    colors = [f"c-{name}" for name in (*range(NUM_COLORS), "page", "text", "muted", "grid")]
    for name in (*colors, *(f"h-{shade}" for shade in range(NUM_SHADES))):
        first, second = re.findall(rf"--{name}: (#[0-9a-f]{{6}});", STYLE)
        assert first != second
    assert "prefers-color-scheme: dark" in STYLE
    assert "prefers-color-scheme: dark" in svg_file(plot("a")).decode()
    # A color of a chart is never written out
    for make in CHARTS.values():
        assert "#" not in make("a").draw(640).svg()


def test_page_has_a_drawing_for_screens_and_one_for_phones() -> None:
    content = render_page(Page("t", charts=[plot("a"), rows("b")])).decode()
    boxes = re.findall(r'viewBox="0 0 (\d+) ', content)
    assert boxes == ["640", "330"] * 2
    assert content.count('<div class="screen">') == content.count('<div class="phone">') == 2
    assert ".chart .grid" in content
    assert ".chart .grid" not in render_page(Page("t")).decode()


def test_long_labels_are_on_two_lines_on_a_phone() -> None:
    row = ChartRow("a-long-name-of-a-case", "a-long-name-of-a-file", remark="12.3 requests/s")
    chart = RowChart("", linear_axis("x", [1.0]), [row])
    for width, is_split in zip(WIDTHS, (True, False), strict=True):
        texts = elements(parsed(chart, width), "text")
        (origin,) = [t for t in texts if row.origin in "".join(t.itertext())]
        assert (origin.text == row.origin) == is_split
        for text in texts:
            at = float(text.get("x", "")) if "end" not in cast(str, text.get("class")) else 0.0
            assert 0 <= at < width


def test_label_of_a_panel_is_whole_on_a_phone() -> None:
    label = "perceiver layer 0 patches keys"
    values = np.array([[0.1]])
    panels = [[Panel(label, "", [Overlay((0, 0, 1, 1), values)])] * 2]
    chart = PictureMap("", None, 1.0, panels, Shades.spanning(1e-7, 1.0, ""))
    texts = [text.text or "" for text in elements(parsed(chart, min(WIDTHS)), "text")]
    assert " ".join(texts).count(label) == 2
    assert label not in texts


def test_legend_is_broken_where_it_is_too_wide() -> None:
    keys = [Key((Mark(i),), f"a name of a file, {i}") for i in range(6)]
    chart = Plot("", log_axis("x", []), linear_axis("y", []), [], keys)
    for width in WIDTHS:
        places = [
            (float(t.get("x", "")), float(t.get("y", "")))
            for t in elements(parsed(chart, width), "text")
            if (t.text or "").startswith("a name")
        ]
        assert len(places) == 6
        assert len({y for _, y in places}) > 1
        assert max(x for x, _ in places) < width - 100
