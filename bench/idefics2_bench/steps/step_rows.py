"""Rows of results: a step as a whole, and each of its parts beside its floor."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from idefics2_bench.steps.division import Division
from idefics2_bench.steps.operation_calls import Call
from idefics2_bench.steps.parts import WHOLE
from idefics2_bench.timing import Time, summary

Row = dict[str, Any]


def rows_of(
    calls: Sequence[Call], whole: Time, division: Division, ceilings: Mapping[str, Any]
) -> list[Row]:
    """Return a row for the step and for each part, the longest first.

    ``whole`` was timed without a trace. The parts add up to ``traced_ms``, of which ``share`` is a
    part's share. A floor is the sum of those of the calls: the longer of the time to move the bytes
    at the measured bandwidth, and of the time to compute at the measured rate of products.
    """
    labels = list(dict.fromkeys(label for times in division.rounds for label in times))
    times = {label: summary([own[label] for own in division.rounds]) for label in labels}
    # A row has a time, and a part of none needs no row
    times = {label: time for label, time in times.items() if time.ms > 0}
    traced = sum(time.ms for time in times.values())
    parts = []
    for label, time in sorted(times.items(), key=lambda item: -item[1].ms):
        own = [call for call in calls if call.label == label]
        row: Row = {"operation": label, **_positive(time), "share": time.ms / traced}
        if own:
            row["calls"] = len(own)
        if label in division.launches:
            row["launches"] = division.launches[label]
        parts.append({**row, **_floor(own, time.ms, ceilings)})
    first = {"operation": WHOLE, **_positive(whole), "traced_ms": traced}
    if division.launches:
        first |= {"launches": division.launches.total(), "unmatched": division.num_unmatched}
    return [{**first, **_floor(calls, whole.ms, ceilings)}, *parts]


def _positive(time: Time) -> Row:
    """Return the fields of ``time``. The ends of its spread are positive, as those of all rows."""
    return {name: max(value, 1e-9) for name, value in asdict(time).items()}


def _floor(calls: Sequence[Call], ms: float, ceilings: Mapping[str, Any]) -> Row:
    costs = [call.cost for call in calls if call.cost is not None]
    if not costs:
        return {}
    # TB/s and TFLOP/s: 10^9 in a millisecond
    moving = [cost.bytes / ceilings["copy_TBps"] / 1e9 for cost in costs]
    computing = [cost.flops / ceilings["matmul_TFLOPs"] / 1e9 for cost in costs]
    floor = sum(map(max, moving, computing))
    return {
        "bytes": sum(cost.bytes for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "floor_ms": floor,
        "bound": "bytes" if sum(moving) >= sum(computing) else "FLOP",
        "over_floor": ms / floor,
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows of steps as Markdown tables."""
    lines: list[str] = []
    for row in rows:
        if row["operation"] == WHOLE:
            name = f"{row['case']}, {row['impl']}, {row['model']}, {row['dtype']}"
            if lines:
                lines.append("")
            if "ms" not in row:
                lines.append(f"{name}: WRONG: the result is not finite")
                continue
            unmatched = row.get("unmatched", 0)
            lines += [
                f"{name}: {row['ms']:.3f} ms, floor {row['floor_ms']:.3f} ms, "
                f"{row['over_floor']:.2f} x; traced {row['traced_ms']:.3f} ms"
                + (f"; {unmatched} kernels without a partner" if unmatched else ""),
                "",
                "| operation | calls | ms | share | MB | GFLOP | floor, ms | of | x floor |",
                "|---|---:|---:|---:|---:|---:|---:|---|---:|",
            ]
            continue
        figures = ("", "", "", "", "")
        if "floor_ms" in row:
            figures = (
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['floor_ms']:.4f}",
                row["bound"],
                f"{row['over_floor']:.2f}",
            )
        lines.append(
            f"| {row['operation']} | {row.get('calls', '')} | {row['ms']:.4f} "
            f"| {row['share']:.1%} | {' | '.join(figures)} |"
        )
    return "\n".join(lines)
