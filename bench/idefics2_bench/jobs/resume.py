"""How long a job needs from its start to the first new row, if its journal has many rows.

    python -m idefics2_bench.jobs.resume FOLDER

As a program it resumes the job in ``FOLDER`` and prints the figures as JSON.
"""

import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from idefics2_bench.jobs.apart import run_apart
from idefics2_bench.jobs.memory import peak_bytes, resident_bytes
from idefics2_bench.jobs.stand_in import (
    MODEL,
    StandInEngine,
    read_input,
    stand_in_answer,
    write_input,
)
from idefics2_engine import Row
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.row_encoding import OutputEncoding
from idefics2_engine.jobs.runner import JobRunner
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.journal import Journal
from idefics2_engine.jobs.writers.output_file import JsonlFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer
from idefics2_engine.outputs import RequestOutput

Figures = dict[str, Any]


def resume_row(folder: Path, count: int) -> Figures:
    """Journal ``count`` rows of ``count + 1``, and resume the job in a process of its own."""
    folder.mkdir()
    write_input(folder, count + 1)
    _journal_rows(folder, count)
    figures: Figures = json.loads(run_apart("idefics2_bench.jobs.resume", [str(folder)]).output)
    if figures["num_computed"] != 1:
        raise RuntimeError(f"one row must be computed, got {figures['num_computed']}")
    return {"impl": "resume", **MODEL, "rows": count, **figures}


class TimedInput:
    """Measures how long the rows of an input take to read.

    Attributes:
        files: Those of the input.
        can_skip: The input's.
        seconds: Time in which rows were read.
    """

    def __init__(self, rows: JobInput) -> None:
        self.files = rows.files
        self.can_skip = rows.can_skip
        self.seconds = 0.0
        self._input = rows

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        """Yield the rows."""
        rows = self._input.rows(begin=begin)
        while True:
            started = time.perf_counter()
            row = next(rows, None)
            self.seconds += time.perf_counter() - started
            if row is None:
                return
            yield row


class FirstRow(StandInEngine):
    """Measures until it is given its first row, which is the first new one."""

    def __init__(self, rows: TimedInput) -> None:
        super().__init__()
        self.figures: Figures = {}
        self._rows = rows
        self._memory = resident_bytes()
        self._cpu = time.process_time()
        self._begin = time.perf_counter()

    def _answers(self, prompts: Iterable[Row]) -> Generator[RequestOutput, None, None]:
        for place, row in enumerate(prompts):
            if not place:
                self.figures = {**self._figures(), "input_seconds": self._rows.seconds}
            yield stand_in_answer(row, place)

    def complete(self) -> None:
        """Add what the whole run took, which ends now."""
        self.figures |= {f"complete_{name}": one for name, one in self._figures().items()}

    def _figures(self) -> Figures:
        return {
            "ms": 1e3 * (time.perf_counter() - self._begin),
            "cpu_seconds": time.process_time() - self._cpu,
            "grown_MB": (resident_bytes() - self._memory) / 1e6,
            "peak_grown_MB": (peak_bytes() - self._memory) / 1e6,
        }


def main() -> None:
    """Resume the job of the folder that the command line names."""
    folder = Path(sys.argv[1])
    job_input = read_input(folder)
    rows = TimedInput(job_input)
    engine = FirstRow(rows)
    result = JobRunner(
        folder / "out.jsonl",
        rows,
        engine,
        OutputEncoding(SaveOptions(), JsonlFormat, job_input.media_root),
        _description(job_input),
    ).run()
    engine.complete()
    print(json.dumps({**engine.figures, "num_computed": result.run.computed}))


def _journal_rows(folder: Path, count: int) -> None:
    job_input = read_input(folder)
    with (
        JobFolder(folder / "out.jsonl", _description(job_input)) as job,
        # One sync at the end is enough here
        Journal(job.path, sync_bytes=1 << 40, sync_seconds=1e9) as journal,
    ):
        for row in job_input.rows():
            if row.index < count:
                out = encode_answer(row, stand_in_answer(row.to_engine(), row.index), SaveOptions())
                journal.append(row.index, row.key, out)


def _description(job_input: JobInput) -> JobDescription:
    return JobDescription({"model": "stand-in"}, job_input.identify())


if __name__ == "__main__":
    main()
