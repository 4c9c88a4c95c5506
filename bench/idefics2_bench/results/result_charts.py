"""Charts of results files: the list of all, and ratios to peers.

A file's rows have one color in all charts that show several files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count

from idefics2_bench.results.bar_charts import memory, offline_time
from idefics2_bench.results.chart_looks import (
    LOOKS,
    MINE,
    NamedChart,
    file_keys,
    is_kernel,
    is_ours,
    kind_of,
    time_text,
)
from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_bench.results.roofline import rooflines
from idefics2_bench.results.size_charts import size_charts
from idefics2_bench.results.step_charts import step_charts
from idefics2_bench.steps.parts import KERNEL as STEPS
from idefics2_engine.charts.axis import log_axis
from idefics2_engine.charts.drawing import Key
from idefics2_engine.charts.row_chart import ChartRow, Dot, RowChart


def charts_of(files: Sequence[ResultsFile]) -> list[NamedChart]:
    """Return the charts for which ``files`` have rows."""
    charts = [*rooflines(files)]
    colors = _colors(files)
    for name, chart in (
        ("kernels-beside-peers", _kernel_ratios(files, colors)),
        ("model-beside-peers", _model_ratios(files, colors)),
        *size_charts(files, colors),
        *step_charts(files),
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
    if row["kernel"] == STEPS:
        return "steps"
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
    keys = [*file_keys(lanes, colors), *([Key((LOOKS[MINE],), MINE)] * has_mine)]
    return RowChart(heading, axis, rows, keys, note, reference=1.0)
