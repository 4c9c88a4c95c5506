"""Charts of bars: where an offline job's time went, and memory."""

from collections.abc import Sequence

from idefics2_bench.results.results_file import ResultsFile, Row
from idefics2_engine.charts.axis import linear_axis
from idefics2_engine.charts.drawing import Key, Mark
from idefics2_engine.charts.row_chart import Bar, ChartRow, RowChart

_KINDS = {"decode": 0, "text": 1, "image": 2, "idle": None}
_MEMORY = {"weights": 0, "KV cache": 1, "other": 2}


def offline_time(files: Sequence[ResultsFile]) -> RowChart | None:
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


def memory(files: Sequence[ResultsFile]) -> RowChart | None:
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
    for (name, impl, gigabytes), own in cases.items():
        bars = [
            Bar(value, color, f"{use}: {value:.2f} GB")
            for (use, color), value in zip(_MEMORY.items(), gigabytes, strict=True)
            if value > 0
        ]
        first, more = own[0], len(set(own)) - 1
        label = _labeled(f"{first} and {more} more" if more else first, impl)
        rows.append(ChartRow(label, name, bars, remark=f"{sum(gigabytes):.3g} GB"))
    keys = [Key((Mark(color, "square"),), use) for use, color in _MEMORY.items()]
    axis = linear_axis("GB of the GPU", [sum(gigabytes) for _, _, gigabytes in cases])
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
