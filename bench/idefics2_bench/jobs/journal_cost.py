"""What the journal costs: jobs with a stand-in for the model, with and without a journal."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from idefics2_bench.jobs.counted_files import CountedFiles
from idefics2_bench.jobs.stand_in import MODEL, StandInEngine, StandInRows
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.journal import Journal, Recovery
from idefics2_engine.jobs.writers.output_file import JsonlFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions

Figures = dict[str, Any]

RATE = 5000.0
"""Rows a second at which the cost is a share of the throughput."""


class TimedJournal(Journal):
    """A journal that measures its own calls while rows finish."""

    seconds = 0.0

    def append(self, row: int, key: str, out: bytes) -> int:
        """Write the record of a finished row; return its number."""
        begin = time.perf_counter()
        try:
            return super().append(row, key, out)
        finally:
            TimedJournal.seconds += time.perf_counter() - begin


class NoJournal:
    """Has no rows and keeps none."""

    recovered = Recovery(0, 0, 0)
    first_missing = 0

    def __init__(
        self,
        folder: Path,
        *,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing."""

    def find(self, row: int, key: str) -> int | None:
        """Find nothing."""
        return None

    def append(self, row: int, key: str, out: bytes) -> int:
        """Count the row; return its number."""
        self._count += 1
        return self._count - 1

    def tick(self) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""


def journal_cost(folder: Path, count: int, rounds: int) -> list[Figures]:
    """Answer ``count`` rows with and without a journal, at ``RATE`` and at full speed, in rounds.

    Returns:
        A row of each, those of the round with the median time at ``RATE``.
    """
    jobs: dict[str, list[Figures]] = {"journal": [], "no-journal": []}
    for turn in range(rounds):
        for name, kind in (("journal", TimedJournal), ("no-journal", NoJournal)):
            place = folder / f"{name}-{turn}"
            place.mkdir(parents=True)
            figures = _job(place / "paced.jsonl", count, RATE, kind)
            fast = _job(place / "fast.jsonl", count, None, kind)
            figures["full_speed_rows_per_s"] = fast["rows_per_s"]
            figures["full_speed_cpu_seconds"] = fast["cpu_seconds"]
            jobs[name].append(figures)
    ours, other = (sorted(rows, key=_ms)[(rounds - 1) // 2] for rows in jobs.values())
    ours |= {
        "peer": "no-journal",
        "peer_ms": other["ms"],
        "speedup": other["ms"] / ours["ms"],
        "lost_share": 1 - other["ms"] / ours["ms"],
        "journal_cpu_us_per_row": 1e6
        * (ours["full_speed_cpu_seconds"] - other["full_speed_cpu_seconds"])
        / count,
        "busy_share": RATE * ours["journal_us_per_row"] / 1e6,
    }
    return [{"impl": name, **MODEL, **row} for name, row in zip(jobs, (ours, other), strict=True)]


def _job(out: Path, count: int, rate: float | None, kind: type) -> Figures:
    files = CountedFiles()
    runner = JobRunner(
        out,
        StandInRows(count),
        StandInEngine(rate),
        OutputEncoding(SaveOptions(), JsonlFormat, None),
        JobDescription({}),
        files=files,
    )
    TimedJournal.seconds = 0.0
    cpu, begin = time.process_time(), time.perf_counter()
    with patch("idefics2_engine.jobs.row_store.Journal", kind):
        result = runner.run()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if result.exit_code != 0 or result.counts.rows != count:
        raise RuntimeError(f"all {count} rows must be answered, got {result}")
    return {
        "rows": count,
        "ms": 1e3 * seconds,
        "rows_per_s": count / seconds,
        "cpu_seconds": cpu,
        "journal_us_per_row": 1e6 * TimedJournal.seconds / count,
        **files.figures,
    }


def _ms(row: Figures) -> float:
    return float(row["ms"])
