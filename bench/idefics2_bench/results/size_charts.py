"""Charts of steps against a size: the batch, the context, the prompt, the images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from idefics2_bench.results.chart_looks import file_keys, time_text
from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_engine.charts.axis import linear_axis, log_axis
from idefics2_engine.charts.drawing import Key, Line, Mark
from idefics2_engine.charts.plot import Plot, Point, Series

_NEEDED = {"batch", "text_tokens", "new_tokens"}
_LineName = tuple[str, str, bool, int]


@dataclass(frozen=True)
class _SizeChart:
    """A chart of rows against a size.

    Attributes:
        name: The name of its SVG file.
        kernel: ``kernel`` of its rows.
        heading: Its heading.
        x: The label of the size.
        y: The label of what is measured.
        x_of: Returns the size of a row.
        y_of: Returns the figure of a row.
        fixed: Returns the size that rows of one line have in common.
        is_log: Whether the vertical axis is logarithmic.
        note: How it is read.
    """

    name: str
    kernel: str
    heading: str
    x: str
    y: str
    x_of: Callable[[Row], float]
    y_of: Callable[[Row], float]
    fixed: Callable[[Row], int] = lambda _row: 0
    is_log: bool = False
    note: str = "Peers are hollow."


_CHARTS = (
    _SizeChart(
        *("decode-step", "step", "Decode step", "sequences", "ms a step"),
        lambda row: row["batch"],
        lambda row: row["ms"],
        lambda row: row.get("context", 0),
        is_log=True,
    ),
    _SizeChart(
        *("decode-tokens", "step", "Decode throughput", "sequences", "new tokens a second"),
        lambda row: row["batch"],
        lambda row: 1e3 * row["new_tokens"] / row["ms"],
        lambda row: row.get("context", 0),
    ),
    _SizeChart(
        *("decode-context", "step", "Decode throughput by context"),
        *("tokens of context", "new tokens a second"),
        lambda row: row.get("context", 0),
        lambda row: 1e3 * row["new_tokens"] / row["ms"],
        lambda row: row["batch"],
        note="A line is a batch size. Peers are hollow.",
    ),
    _SizeChart(
        *("prefill-tokens", "prefill", "Prefill throughput"),
        *("tokens of the prompt", "tokens a second"),
        lambda row: row["text_tokens"],
        lambda row: 1e3 * row["text_tokens"] / row["ms"],
    ),
    _SizeChart(
        *("image-size", "image", "Image throughput", "patches of an image", "images a second"),
        lambda row: row["patches"] / row["images"],
        lambda row: 1e3 * row["images"] / row["ms"],
        is_log=True,
        note="A point is a batch of equal images. Peers are hollow.",
    ),
)


def size_charts(
    files: Sequence[ResultsFile], colors: Mapping[str, int]
) -> Iterator[tuple[str, Plot]]:
    """Yield the name and the chart of each size of which ``files`` have at least two."""
    for chart in _CHARTS:
        if (drawn := _plot(chart, files, colors)) is not None:
            yield chart.name, drawn


def _plot(
    chart: _SizeChart, files: Sequence[ResultsFile], colors: Mapping[str, int]
) -> Plot | None:
    """Return a line for each file, implementation, precision and fixed size."""
    lines: dict[_LineName, list[Point]] = {}
    looks: dict[_LineName, tuple[Mark, str]] = {}
    for file in files:
        for row in file.timed:
            if row["kernel"] != chart.kernel or not row.keys() >= _NEEDED or "mixed" in row["case"]:
                continue
            is_nf4, is_peer = row["case"].endswith("-nf4"), file.is_peer(row)
            look = Mark(colors[file.name], _shape(row["impl"], is_nf4), is_hollow=is_peer)
            who = row["impl"] if is_peer else "the engine in NF4" if is_nf4 else "the engine"
            line = (file.name, row["impl"], is_nf4, int(chart.fixed(row)))
            looks[line] = look, who
            title = f"{row['case']}, {row['impl']}, {file.name}: {time_text(row['ms'])}"
            point = Point(float(chart.x_of(row)), float(chart.y_of(row)), title)
            lines.setdefault(line, []).append(point)
    # Sizes that were varied together with another one say nothing about this one
    varied = {name[-1] for name, own in lines.items() if len({point.x for point in own}) > 1}
    lines = {name: own for name, own in lines.items() if name[-1] in varied}
    if not lines:
        return None
    points = [point for own in lines.values() for point in own]
    sizes, values = sorted({point.x for point in points}), [point.y for point in points]
    kinds: dict[str, Mark] = {}
    for name in lines:
        look, who = looks[name]
        kinds.setdefault(who, Mark(None, look.shape, look.is_hollow))
    return Plot(
        chart.heading,
        log_axis(chart.x, sizes, sizes),
        log_axis(chart.y, values) if chart.is_log else linear_axis(chart.y, values),
        [
            Series(
                sorted(own, key=lambda point: point.x),
                looks[name][0],
                Line(looks[name][0].color, is_dashed=looks[name][0].is_hollow),
            )
            for name, own in sorted(lines.items(), key=lambda item: not looks[item[0]][0].is_hollow)
        ],
        [
            *file_keys(dict.fromkeys(name[0] for name in lines), colors),
            *(Key((mark,), who) for who, mark in kinds.items()),
        ],
        chart.note,
    )


def _shape(impl: str, is_nf4: bool) -> Literal["circle", "square", "diamond"]:
    if is_nf4:
        return "square"
    return "diamond" if impl.endswith("compiled") else "circle"
