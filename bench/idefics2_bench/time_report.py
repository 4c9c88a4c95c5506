"""Where the seconds of a job went, from the engine's stats before and after it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from idefics2_engine.runtime.stats import EngineStats

Row = dict[str, Any]

KINDS = ("decode", "text", "image")
PARTS = ("plan", "launch", "wait", "land", "output", "idle")


def time_figures(before: EngineStats, after: EngineStats, wall: float) -> Row:
    """Return the seconds and counts of a job that took ``wall`` seconds.

    ``thread_seconds`` are the parts of the engine's thread, and add up to its time.
    ``device_seconds`` are those of each kind of step, and ``idle``, which is the rest of ``wall``.
    On a CPU all of ``wall`` is idle.
    """
    then = asdict(before)
    done = {name: value - then[name] for name, value in asdict(after).items()}

    def by_kind(field: str) -> Row:
        return {kind: done[f"{kind}_{field}"] for kind in KINDS}

    device = by_kind("device_seconds")
    return {
        "device_seconds": {**device, "idle": wall - sum(device.values())},
        "thread_seconds": {part: done[f"{part}_seconds"] for part in PARTS},
        "thread_cpu_seconds": by_kind("cpu_seconds"),
        "prepare_seconds": done["prepare_seconds"],
        "steps": by_kind("steps"),
        **{
            name: done[name]
            for name in (
                "computed_tokens",
                "cached_tokens",
                "cached_tiles",
                "encoded_tiles",
                "encoded_patches",
                "padded_tokens",
                "padded_patches",
            )
        },
    }


def time_lines(row: Row) -> str:
    """Return the figures of ``row`` for people who watch."""
    device, cpu, steps = row["device_seconds"], row["thread_cpu_seconds"], row["steps"]
    lines = [
        f"device, s: {_listed(device)}",
        f"engine's thread, s: {_listed(row['thread_seconds'])}; "
        f"preparing images, all threads: {row['prepare_seconds']:.2f}",
        "steps, CPU seconds of the thread over device seconds: "
        + ", ".join(f"{kind} {steps[kind]}, {_ratio(cpu[kind], device[kind])}" for kind in KINDS),
        f"from caches: {row['cached_tokens']} tokens, {row['cached_tiles']} tiles, "
        f"{row['cached_files']} decoded files; "
        f"compiled in the job: {row['compiled_kernels']} kernels, {row['captured_graphs']} graphs",
    ]
    if (bound := row.get("device_bound")) is not None:
        lines += [
            f"device-bound: {bound['requests_per_second']:.1f} requests/s, of which s: "
            f"{_listed(bound['seconds'])} = {bound['formula']}",
            f"padding: {row['padded_tokens']} tokens, {row['padded_patches']} patches, "
            f"{bound['padded_seconds']:.2f} s, {bound['padded_share']:.1%} of the device's seconds",
        ]
    slow = row["slow_host"]
    lines.append(
        f"Python's loop: {row['loop_seconds']:.2f} s here; at {slow['loop_seconds']:.1f} s it would "
        f"be {slow['requests_per_second']:.1f} requests/s"
    )
    return "\n".join(f"  {line}" for line in lines)


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


def _ratio(cpu: float, device: float) -> str:
    return f"{cpu / device:.2f}" if device else "-"
