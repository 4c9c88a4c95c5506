"""Charts of results files: rooflines, ratios to peers, steps against sizes, time and memory.

A file's rows have one color in all charts that show several files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Literal

from idefics2_bench.bar_charts import memory, offline_time
from idefics2_bench.chart_looks import (
    LOOKS,
    MINE,
    NamedChart,
    is_kernel,
    is_ours,
    kind_of,
    time_text,
)
from idefics2_bench.results_file import ResultsFile, Row
from idefics2_bench.roofline import rooflines
from idefics2_engine.charts.axis import linear_axis, log_axis
from idefics2_engine.charts.drawing import Key, Line, Mark
from idefics2_engine.charts.plot import Plot, Point, Series
from idefics2_engine.charts.row_chart import ChartRow, Dot, RowChart


def charts_of(files: Sequence[ResultsFile]) -> list[NamedChart]:
    """Return the charts for which ``files`` have rows."""
    charts = [*rooflines(files)]
    colors = _colors(files)
    for name, chart in (
        ("kernels-beside-peers", _kernel_ratios(files, colors)),
        ("model-beside-peers", _model_ratios(files, colors)),
        ("decode-step", _decode_step(files, colors)),
        ("decode-tokens", _decode_tokens(files, colors)),
        ("prefill-tokens", _prefill_tokens(files, colors)),
        ("offline-time", offline_time(files)),
        ("memory", memory(files)),
    ):
        if chart is not None:
            charts.append(NamedChart(name, chart))
    return charts


def _colors(files: Sequence[ResultsFile]) -> dict[str, int]:
    """Return a color for each file. Files whose rows are in one chart differ, as far as possible."""
    suites = {file.name: {_suite(row) for row in file.timed} for file in files}
    colors: dict[str, int] = {}
    for name, own in suites.items():
        taken = {color for other, color in colors.items() if suites[other] & own}
        colors[name] = next(color for color in count() if color not in taken)
    return colors


def _suite(row: Row) -> str:
    if row["kernel"] == "images":
        return "images"
    return "kernels" if is_kernel(row) else "model"


def _kernel_ratios(files: Sequence[ResultsFile], colors: Mapping[str, int]) -> RowChart | None:
    return _ratios(
        *(files, colors, "kernels"),
        lambda row: str(row["kernel"]),
        "Kernels beside the fastest peer",
        "A point is a case at the model's shapes. Right of the line our kernel is faster.",
    )


def _model_ratios(files: Sequence[ResultsFile], colors: Mapping[str, int]) -> RowChart | None:
    return _ratios(
        *(files, colors, "model"),
        lambda row: str(row["case"]),
        "The model beside the fastest peer",
        "Right of the line the engine is faster than the fastest peer in the same run.",
    )


def _ratios(
    files: Sequence[ResultsFile],
    colors: Mapping[str, int],
    suite: str,
    label: Callable[[Row], str],
    heading: str,
    note: str,
) -> RowChart | None:
    """Return our speed over the best peer's, with a row for each label."""
    labeled: dict[str, list[Dot]] = {}
    # Files in a chart of many points have lanes of their own
    lanes: dict[str, int] = {}
    has_mine = False
    for file in files:
        for row in file.timed:
            if "speedup" not in row or not is_ours(file, row) or _suite(row) != suite:
                continue
            lane = lanes.setdefault(file.name, len(lanes)) if suite == "kernels" else 0
            lanes.setdefault(file.name, 0)
            look = replace(LOOKS[kind_of(file, row)], color=colors[file.name])
            has_mine |= row["impl"] == MINE
            title = (
                f"{row['case']}, {file.name}: {row['impl']} {time_text(row['ms'])}, {row['peer']} "
                f"{time_text(row['peer_ms'])}, {row['speedup']:.3g} x"
            )
            labeled.setdefault(label(row), []).append(Dot(row["speedup"], look, title, lane))
    if not labeled:
        return None
    values = [dot.value for dots in labeled.values() for dot in dots]
    rows = [ChartRow(name, dots=dots) for name, dots in labeled.items()]
    axis = log_axis("times as fast as the fastest peer", [*values, 1.0])
    keys = [*_file_keys(lanes, colors), *([Key((LOOKS[MINE],), MINE)] * has_mine)]
    return RowChart(heading, axis, rows, keys, note, reference=1.0)


def _decode_step(files: Sequence[ResultsFile], colors: Mapping[str, int]) -> Plot | None:
    return _against_size(
        *(files, colors),
        "step",
        lambda row: float(row["batch"]),
        lambda row: float(row["ms"]),
        ("Decode step", "sequences", "ms a step"),
        is_log=True,
    )


def _decode_tokens(files: Sequence[ResultsFile], colors: Mapping[str, int]) -> Plot | None:
    return _against_size(
        *(files, colors),
        "step",
        lambda row: float(row["batch"]),
        lambda row: 1e3 * row["new_tokens"] / row["ms"],
        ("Decode throughput", "sequences", "new tokens a second"),
        is_log=False,
    )


def _prefill_tokens(files: Sequence[ResultsFile], colors: Mapping[str, int]) -> Plot | None:
    return _against_size(
        *(files, colors),
        "prefill",
        lambda row: float(row["text_tokens"]),
        lambda row: 1e3 * row["text_tokens"] / row["ms"],
        ("Prefill throughput", "tokens of the prompt", "tokens a second"),
        is_log=False,
    )


def _against_size(
    files: Sequence[ResultsFile],
    colors: Mapping[str, int],
    kernel: str,
    x_of: Callable[[Row], float],
    y_of: Callable[[Row], float],
    words: tuple[str, str, str],
    *,
    is_log: bool,
) -> Plot | None:
    """Return a line for each file, implementation, precision and context.

    There is no chart of one size.
    """
    heading, x_label, y_label = words
    lines: dict[tuple[str, str, bool, int], list[Point]] = {}
    looks: dict[tuple[str, str, bool, int], tuple[Mark, Line]] = {}
    shown: dict[str, None] = {}
    kinds: dict[str, Mark] = {}
    for file in files:
        for row in file.timed:
            if row["kernel"] != kernel or not {"batch", "text_tokens", "new_tokens"} <= row.keys():
                continue
            is_nf4, is_peer = row["case"].endswith("-nf4"), file.is_peer(row)
            shown[file.name] = None
            color = colors[file.name]
            look = Mark(color, _shape(row["impl"], is_nf4), is_hollow=is_peer)
            who = row["impl"] if is_peer else "the engine in NF4" if is_nf4 else "the engine"
            kinds.setdefault(who, Mark(None, look.shape, look.is_hollow))
            line = (file.name, row["impl"], is_nf4, int(row.get("context", 0)))
            looks[line] = look, Line(color, is_dashed=is_peer)
            title = f"{row['case']}, {row['impl']}, {file.name}: {time_text(row['ms'])}"
            lines.setdefault(line, []).append(Point(x_of(row), y_of(row), title))
    points = [point for own in lines.values() for point in own]
    sizes = sorted({point.x for point in points})
    if len(sizes) < 2:
        return None
    values = [point.y for point in points]
    return Plot(
        heading,
        log_axis(x_label, sizes, sizes),
        log_axis(y_label, values) if is_log else linear_axis(y_label, values),
        [
            Series(sorted(own, key=lambda point: point.x), *looks[line])
            for line, own in sorted(lines.items(), key=lambda item: not looks[item[0]][0].is_hollow)
        ],
        [*_file_keys(shown, colors), *(Key((mark,), who) for who, mark in kinds.items())],
        "Peers are hollow.",
    )


def _shape(impl: str, is_nf4: bool) -> Literal["circle", "square", "diamond"]:
    if is_nf4:
        return "square"
    return "diamond" if impl.endswith("compiled") else "circle"


def _file_keys(shown: Iterable[str], colors: Mapping[str, int]) -> list[Key]:
    """Return the legend of files, unless there is only one."""
    keys = [Key((Mark(colors[name]),), name) for name in shown]
    return keys if len(keys) > 1 else []
