"""Heat maps: the shade of each value, its place, and legends that can be read."""

import re
from itertools import pairwise

import numpy as np
import pytest

from idefics2_engine.charts.drawing import STYLE
from idefics2_engine.charts.heat_map import HeatColumn, HeatMap, HeatRow
from idefics2_engine.charts.picture_map import Overlay, Panel, PictureMap
from idefics2_engine.charts.shades import NUM_SHADES, Shades, cells, pooled

WIDTHS = (330, 640)
SOURCE = "data:image/jpeg;base64,AAAA"


def luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return float(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)


def test_shades_are_steps_of_a_logarithmic_scale() -> None:
    shades = Shades.spanning(1.2e-7, 0.02, "")
    assert shades.low == pytest.approx(1e-7)
    # Six decades in twelve steps
    assert shades.decades == 1 / 2
    values = np.array([0.0, np.nan, 1e-9, 1.1e-7, 4e-7, 1.1e-6, 1e-5, 0.09, 50.0, np.inf])
    assert shades.of(values).tolist() == [NUM_SHADES, -1, 0, 0, 1, 2, 4, 11, 11, 11]


@pytest.mark.parametrize(("high", "decades"), [(0.0, 4), (1e-6, 4), (1e-3, 4), (0.5, 8), (1e9, 24)])
def test_scale_reaches_the_largest_value(high: float, decades: float) -> None:
    shades = Shades.spanning(1e-7, high, "")
    assert shades.decades * NUM_SHADES == pytest.approx(decades)
    assert high <= shades.low * 10 ** (decades + 1e-6)


def test_shades_are_told_apart_by_how_light_they_are() -> None:
    """So they are in both sets, also for readers who do not see all colors."""
    for scheme, sign in ((0, -1), (1, 1)):
        colors = [re.findall(rf"--h-{i}: (#\w+);", STYLE)[scheme] for i in range(NUM_SHADES)]
        lights = [luminance(color) for color in colors]
        assert all(sign * (b - a) > 0 for a, b in pairwise(lights)), scheme


def test_cells_of_one_shade_in_a_row_are_one_line() -> None:
    matrix = np.array([[3, 3, -1, 5], [5, 3, 3, 3]], dtype=np.int8)
    three, five = re.findall(r'd="([^"]+)" class="cells h\d"', cells(matrix, 10, 20, 40, 8))
    assert three == "M10.0 22.0H30.0M20.0 26.0H50.0"
    assert five == "M40.0 22.0H50.0M10.0 26.0H20.0"


def test_pooled_values_are_the_largest_of_their_neighbors() -> None:
    values = np.array([[1.0, 2.0, 7.0], [np.nan, 4.0, np.nan], [np.nan, np.nan, 6.0]])
    assert pooled(values, 3) is values
    found = pooled(values, 2)
    assert found[0].tolist() == [4.0, 7.0]
    assert np.isnan(found[1, 0])
    assert found[1, 1] == 6.0


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_columns_do_not_overlap(width: float) -> None:
    columns = [HeatColumn(f"layer {i}", f"{i}", "") for i in range(38)]
    rows = [HeatRow("0 a long text of a token", "")]
    chart = HeatMap("", rows, columns, np.ones((1, 38)), Shades.spanning(1e-3, 1, "Errors"))
    content = chart.draw(width).svg()
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="muted middle">([^<]+)<', content)
    last = max(float(y) for _, y, _ in found)
    labels = sorted((float(x), text) for x, y, text in found if float(y) == last)
    assert labels[-1][1] == "37"
    assert len(labels) > 8
    for (left, first), (right, second) in pairwise(labels):
        assert right - left > 6.7 * (len(first) + len(second)) / 2


def test_panels_of_a_stage_are_side_by_side_on_a_phone() -> None:
    shades = Shades.spanning(1e-3, 1, "")
    panels = [
        [Panel(f"{stage} {view}", "", [Overlay((0, 0, 1, 1), np.ones((1, 1)))]) for view in "ab"]
        for stage in range(3)
    ]
    chart = PictureMap("", SOURCE, 1.0, panels, shades)
    for width, order in zip(WIDTHS, ("0a 0b 1a 1b 2a 2b", "0a 1a 2a 0b 1b 2b"), strict=True):
        content = chart.draw(width).svg()
        assert re.findall(r">(\d) ([ab])<", content) == [tuple(name) for name in order.split()]
        boxes = re.findall(r'<image href="[^"]+" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', content)
        assert len(boxes) == 6
        assert max(float(x) + float(size) for x, size in boxes) <= width + 0.2


def test_cells_are_where_their_part_of_the_picture_is() -> None:
    overlays = [
        Overlay((0, 0, 0.5, 0.5), np.full((2, 2), 0.1)),
        Overlay((0.5, 0.5, 1, 1), np.full((2, 2), 0.002)),
    ]
    chart = PictureMap("", SOURCE, 1.0, [[Panel("", "", overlays)]], Shades.spanning(1e-3, 1, ""))
    content = chart.draw(330).svg()
    (x, y, width) = map(
        float, re.findall(r'<image href="[^"]+" x="(.+?)" y="(.+?)" width="(.+?)"', content)[0]
    )
    lines = re.findall(r'd="M([\d.]+) ([\d.]+)H([\d.]+)M[^"]*" class="cells', content)
    first, second = ([float(number) for number in line] for line in lines)
    assert (first[0], first[2]) == pytest.approx((x, x + width / 2), abs=0.11)
    assert (second[0], second[2]) == pytest.approx((x + width / 2, x + width), abs=0.11)
    assert second[1] - first[1] == pytest.approx(width / 2, abs=0.11)
    assert y < first[1] < y + width / 2


def test_pictures_are_data() -> None:
    with pytest.raises(ValueError, match="source must be the data URI"):
        PictureMap("", "https://example.org/a.jpg", 1.0, [], Shades.spanning(1e-3, 1, ""))
