"""Charts of results files: rooflines, ratios to peers, steps against sizes, time and memory.

A file's rows have one color in all charts that show several files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from idefics2_bench.results_file import ResultsFile, Row
from idefics2_engine.charts.axis import linear_axis, log_axis
from idefics2_engine.charts.drawing import Chart, Key, Line, Mark
from idefics2_engine.charts.plot import Plot, Point, Series
from idefics2_engine.charts.row_chart import Bar, ChartRow, Dot, RowChart

OURS = ("triton", "mine")
"""Implementations that charts show. Others are variants that the engine does not call."""

# Families of operations, by a part of their names. The first that fits counts.
_FAMILIES = {
    "attention": "attention",
    "nf4": "NF4",
    "linear": "products",
    "norm": "norms",
    "": "others",
}
_KINDS = {"decode": 0, "text": 1, "image": 2, "idle": None}
_MEMORY = {"weights": 0, "KV cache": 1, "other": 2}


@dataclass(frozen=True)
class NamedChart:
    """A chart and the name of its SVG file, without a suffix."""

    name: str
    chart: Chart


def charts_of(files: Sequence[ResultsFile]) -> list[NamedChart]:
    """Return the charts for which ``files`` have rows."""
    charts = [*_rooflines(files)]
    colors = _colors(files)
    for name, chart in (
        ("kernels-beside-peers", _kernel_ratios(files, colors)),
        ("model-beside-peers", _model_ratios(files, colors)),
        ("decode-step", _decode_step(files, colors)),
        ("decode-tokens", _decode_tokens(files, colors)),
        ("prefill-tokens", _prefill_tokens(files, colors)),
        ("offline-time", _offline_time(files)),
        ("memory", _memory(files)),
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
    return "kernels" if "TFLOPs" in row else "model"


def _rooflines(files: Sequence[ResultsFile]) -> Iterator[NamedChart]:
    """Yield the roofline of each file with kernels' rows and measured ceilings."""
    shown = [file for file in files if _flops_rows(file) and "copy_TBps" in file.machine]
    for file, number in zip(shown, count(1), strict=False):
        name = "roofline" if len(shown) == 1 else f"roofline-{number}"
        yield NamedChart(name, _roofline(file))


def _flops_rows(file: ResultsFile) -> list[Row]:
    """Return our kernels' rows and each case's best peer."""
    rows = [row for row in file.timed if row.get("TFLOPs") and row.get("GBps")]
    best = {(row["kernel"], row["case"], row["peer"]) for row in rows if "peer" in row}
    return [
        row
        for row in rows
        if row["impl"] in OURS or (row["kernel"], row["case"], row["impl"]) in best
    ]


def _roofline(file: ResultsFile) -> Plot:
    bandwidth, peak = float(file.machine["copy_TBps"]), float(file.machine["matmul_TFLOPs"])
    rows = _flops_rows(file)
    points = [
        Point(
            1e3 * row["TFLOPs"] / row["GBps"],
            row["TFLOPs"],
            f"{row['kernel']} {row['case']}, {row['impl']}: {row['TFLOPs']:.4g} TFLOP/s, "
            f"{row['GBps']:.0f} GB/s, {row['roofline']:.0%} of the roofline",
        )
        for row in rows
    ]
    x = log_axis("FLOP a byte", [*(point.x for point in points), peak / bandwidth])
    y = log_axis("TFLOP/s", [*(point.y for point in points), peak])
    ridge = peak / bandwidth
    ceiling = [Point(x.low, x.low * bandwidth), Point(ridge, peak), Point(x.high, peak)]
    # The ceiling of bandwidth begins where the axes do
    if ceiling[0].y < y.low:
        ceiling[0] = Point(y.low / bandwidth, y.low)
    series = [Series(ceiling, line=Line(None))]
    used = set()
    for is_peer in (True, False):
        for color, family in enumerate(_FAMILIES.values()):
            own = [
                point
                for row, point in zip(rows, points, strict=True)
                if _family(row["kernel"]) == family and file.is_peer(row) == is_peer
            ]
            if own:
                used.add((color, family))
                series.append(Series(own, Mark(color, is_hollow=is_peer)))
    keys = [Key((Mark(color),), family) for color, family in sorted(used)]
    keys += [
        Key((Mark(None, is_hollow=True),), "best peer"),
        Key((Line(None),), f"measured: {bandwidth:.3g} TB/s, {peak:.0f} TFLOP/s"),
    ]
    machine = file.machine.get("gpu") or file.name
    return Plot(
        f"Roofline, {machine}",
        *(x, y, series, keys),
        "Every kernel and case below the bandwidth and the matrix product that were measured on the "
        f"same machine ({file.name}). Inputs of a case that fit into the L2 cache may be above.",
    )


def _family(kernel: str) -> str:
    return next(family for part, family in _FAMILIES.items() if part in kernel)


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
    for file in files:
        for row in file.timed:
            if "speedup" not in row or row["impl"] not in OURS or _suite(row) != suite:
                continue
            lane = lanes.setdefault(file.name, len(lanes)) if suite == "kernels" else 0
            lanes.setdefault(file.name, 0)
            look = Mark(colors[file.name], "diamond" if row["impl"] == "mine" else "circle")
            title = (
                f"{row['case']}, {file.name}: {row['impl']} {_time(row['ms'])}, {row['peer']} "
                f"{_time(row['peer_ms'])}, {row['speedup']:.3g} x"
            )
            labeled.setdefault(label(row), []).append(Dot(row["speedup"], look, title, lane))
    if not labeled:
        return None
    values = [dot.value for dots in labeled.values() for dot in dots]
    rows = [ChartRow(name, dots=dots) for name, dots in labeled.items()]
    axis = log_axis("times as fast as the fastest peer", [*values, 1.0])
    return RowChart(heading, axis, rows, _file_keys(lanes, colors), note, reference=1.0)


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
    """Return a line for each file, implementation, precision and context."""
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
            title = f"{row['case']}, {row['impl']}, {file.name}: {_time(row['ms'])}"
            lines.setdefault(line, []).append(Point(x_of(row), y_of(row), title))
    points = [point for own in lines.values() for point in own]
    if not points:
        return None
    sizes = sorted({point.x for point in points})
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


def _shape(impl: str, is_nf4: bool) -> str:
    if is_nf4:
        return "square"
    return "diamond" if impl.endswith("compiled") else "circle"


def _offline_time(files: Sequence[ResultsFile]) -> RowChart | None:
    """Return where the time of each offline job went, by request."""
    rows = []
    most = 0.0
    for file in files:
        for row in file.timed:
            seconds, requests = row.get("device_seconds"), row.get("requests")
            if not isinstance(seconds, dict) or not requests:
                continue
            parts = {kind: 1e3 * seconds.get(kind, 0.0) / requests for kind in _KINDS}
            most = max(most, sum(parts.values()))
            bars = [
                Bar(value, _KINDS[kind], f"{kind}: {value:.3g} ms a request")
                for kind, value in parts.items()
                if value > 0
            ]
            remark = f"{1e3 * requests / row['ms']:.4g} requests/s"
            label = _labeled(row["case"], row["impl"])
            rows.append(ChartRow(label, file.name, bars, remark=remark))
    if not rows:
        return None
    names = {"decode": "decode", "text": "prompts", "image": "with images", "idle": "idle"}
    keys = [Key((Mark(color, "square"),), names[kind]) for kind, color in _KINDS.items()]
    return RowChart(
        "Offline jobs by kind of step",
        linear_axis("ms of the device a request", [most]),
        *(rows, keys),
        "A step with images computes prompts and decodes, too. A step with prompts decodes, too.",
    )


def _memory(files: Sequence[ResultsFile]) -> RowChart | None:
    """Return the memory of the GPU by its use; cases with the same are one row."""
    cases: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for file in files:
        for row in file.timed:
            if (parts := _memory_parts(row)) is None or file.is_peer(row):
                continue
            key = (file.name, row["impl"], tuple(round(part, 2) for part in parts))
            cases.setdefault(key, []).append(row["case"])
    if not cases:
        return None
    rows = []
    for (name, impl, parts), own in cases.items():
        bars = [
            Bar(value, color, f"{use}: {value:.2f} GB")
            for (use, color), value in zip(_MEMORY.items(), parts, strict=True)
            if value > 0
        ]
        first, more = own[0], len(set(own)) - 1
        label = _labeled(f"{first} and {more} more" if more else first, impl)
        rows.append(ChartRow(label, name, bars, remark=f"{sum(parts):.3g} GB"))
    keys = [Key((Mark(color, "square"),), use) for use, color in _MEMORY.items()]
    axis = linear_axis("GB of the GPU", [sum(parts) for _, _, parts in cases])
    note = "The KV cache of an offline job takes what the GPU has left, unless it is given a size."
    return RowChart("Memory", axis, rows, keys, note)


def _memory_parts(row: Row) -> tuple[float, float, float] | None:
    """Return GB of weights, of the KV cache, and of everything else."""
    if "weights_GB" not in row:
        return None
    weights, cache = row["weights_GB"], row.get("kv_cache_GB", 0.0)
    if "other_GB" in row:
        return weights, cache, row["other_GB"]
    return weights, cache, max(0.0, row.get("allocated_GB", weights) - weights - cache)


def _labeled(case: str, impl: str) -> str:
    return case if impl in ("triton", "reference") else f"{case} {impl.removeprefix('triton-')}"


def _file_keys(shown: Iterable[str], colors: Mapping[str, int]) -> list[Key]:
    """Return the legend of files, unless there is only one."""
    keys = [Key((Mark(colors[name]),), name) for name in shown]
    return keys if len(keys) > 1 else []


def _time(ms: float) -> str:
    return f"{ms * 1e3:.4g} us" if ms < 1 else f"{ms:.4g} ms"
