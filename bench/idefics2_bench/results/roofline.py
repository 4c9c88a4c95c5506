"""Rooflines of kernels, below the ceilings that were measured on the same machine."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from idefics2_bench.results.chart_looks import KERNELS, LOOKS, MINE, NamedChart, kind_of
from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_engine.charts.axis import log_axis
from idefics2_engine.charts.drawing import Key, Line, Mark
from idefics2_engine.charts.plot import Plot, Point, Series

# Families of operations, by a part of their names. The first that fits counts.
_FAMILIES = {
    "attention": "attention",
    "nf4": "NF4",
    "linear": "products",
    "norm": "norms",
    "": "others",
}


def rooflines(files: Sequence[ResultsFile]) -> Iterator[NamedChart]:
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
        if row["impl"] in KERNELS or (row["kernel"], row["case"], row["impl"]) in best
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
    kinds = [kind_of(file, row) for row in rows]
    for kind in ("best peer", "ours", MINE):
        for color, family in enumerate(_FAMILIES.values()):
            own = [
                point
                for row, point, of in zip(rows, points, kinds, strict=True)
                if _family(row["kernel"]) == family and of == kind
            ]
            if own:
                used.add((color, family))
                series.append(Series(own, replace(LOOKS[kind], color=color)))
    keys = [Key((Mark(color),), family) for color, family in sorted(used)]
    keys += [
        *(Key((look,), kind) for kind, look in LOOKS.items() if kind in kinds and kind != "ours"),
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
