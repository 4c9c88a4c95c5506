"""The files beside a job's output: statistics of rows, summary, manifest and page."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idefics2_engine.cli.answer_table import answer_table
from idefics2_engine.cli.jobs import job_options
from idefics2_engine.cli.jobs.fingerprint import device_name
from idefics2_engine.jobs.job_observer import FinishedRow, JobObserver
from idefics2_engine.jobs.job_result import JobResult, RowCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.store.job_description import JOB_JSON, JobDescription
from idefics2_engine.jobs.store.job_folder import job_path
from idefics2_engine.jobs.writers.manifest import manifest_of
from idefics2_engine.jobs.writers.own_file import beside, write_json_beside
from idefics2_engine.jobs.writers.report import REPORT_ROWS, write_report
from idefics2_engine.jobs.writers.row_output import SaveOptions
from idefics2_engine.jobs.writers.stats_file import StatsFile
from idefics2_engine.jobs.writers.summary import RunFigures, summary_of


class RowStatistics(JobObserver):
    """Writes ``OUT.stats.jsonl``.

    Args:
        out: The output.
        restart: Whether the job begins although its folder is there.
    """

    def __init__(self, out: Path, *, restart: bool) -> None:
        self._out = out
        self._is_new = restart or not (job_path(out) / JOB_JSON).exists()
        self._file: StatsFile | None = None

    def begin(self, counts: RowCounts) -> None:
        """Open the file."""
        self._file = StatsFile(self._out, is_new=self._is_new)

    def finish_row(self, finished: FinishedRow) -> None:
        """Add the line of a row that was computed."""
        assert self._file is not None
        if finished.answer is not None:
            worker = getattr(finished.answer.metrics, "worker", None)
            self._file.add(finished.row, finished.answer, attempts=finished.attempts, worker=worker)

    def tick(self) -> None:
        """Write the lines so far."""
        assert self._file is not None
        self._file.flush()

    def end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class FirstRows(JobObserver):
    """Keeps the first ``number`` rows, to show them."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._rows: dict[int, tuple[JobRow, Mapping[str, Any]]] = {}

    def finish_row(self, finished: FinishedRow) -> None:
        """Keep a row if it is one of the first."""
        if finished.row.index < self._number:
            self._rows[finished.row.index] = finished.row, finished.out

    def in_order(self) -> list[tuple[JobRow, Mapping[str, Any]]]:
        """Return the rows in the order of the input."""
        return [self._rows[index] for index in sorted(self._rows)]


class FilesBeside:
    """Writes summary, manifest and page when the output is complete.

    Args:
        args: The command line.
        out: The output.
        media_root: Folder of the images.
        save: What the output has besides text.
        workers: Processes that compute.

    Attributes:
        observers: Must be told what happens.
        moved: Files of other jobs that were moved aside, under their new names.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        out: Path,
        media_root: Path,
        save: SaveOptions,
        workers: int,
    ) -> None:
        self._args = args
        self._out = out
        self._media_root = media_root
        self._save = save
        self._workers = workers
        self._first_rows = FirstRows(max(args.show, REPORT_ROWS if args.report else 0))
        self.observers: Sequence[JobObserver] = [
            *([RowStatistics(out, restart=args.restart)] if args.stats else []),
            self._first_rows,
        ]
        self.moved: list[Path] = []

    @property
    def are_there(self) -> bool:
        """Whether an earlier run has written what this one is asked for, and was not killed before.

        A table is always made again.
        """
        report = self._args.report
        is_reported = report is None or os.path.exists(report)
        return not self._args.show and is_reported and beside(self._out, "summary.json").exists()

    def num_errors(self) -> int | None:
        """Return the error rows of the complete output, ``None`` if no summary says it."""
        try:
            rows = json.loads(beside(self._out, "summary.json").read_bytes())["rows"]
            return int(rows["errors"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def table(self) -> list[str]:
        """Return the lines of the table that was asked for, none without ``--show``."""
        rows = self._first_rows.in_order()[: self._args.show]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return answer_table(rows, width) if rows else []

    def write(self, result: JobResult, job: JobDescription) -> None:
        """Write the files; raise ``OSError`` if one cannot be written."""
        assert result.output is not None
        device = device_name(self._args)
        figures = self._figures(result, device)
        summary = summary_of(result.counts, result.run, figures, result.shadow)
        moved = []
        # A run that only shows rows leaves the figures of the run that computed them
        if result.run.rows or not self._is_written(summary, job):
            manifest = manifest_of(
                job,
                result.output,
                device={"name": device, "cores": os.cpu_count()},
                command=sys.argv,
            )
            moved = [
                write_json_beside(self._out, "summary", job.fingerprint, summary),
                write_json_beside(self._out, "manifest", job.fingerprint, manifest),
            ]
        if self._args.report:
            moved.append(self._write_page(summary, job, device))
        self.moved = [path for path in moved if path is not None]

    def _is_written(self, summary: Mapping[str, Any], job: JobDescription) -> bool:
        """Return whether the file of the summary says the same of the job as ``summary``."""
        try:
            written = json.loads(beside(self._out, "summary.json").read_bytes())
        except (OSError, ValueError):
            return False
        of_job = {**summary, "fingerprint": job.fingerprint, "run": written.get("run")}
        return all(written.get(name) == value for name, value in of_job.items())

    def _figures(self, result: JobResult, device: str) -> RunFigures:
        waits = result.waits
        return RunFigures(
            seconds=result.seconds,
            load_seconds=result.load_seconds,
            attempts=result.run.computed + result.run.repeated,
            workers=self._workers,
            patches=result.run.patches,
            waits={
                "reader_for_window": waits.window_seconds,
                "engine_for_rows": waits.idle_seconds,
                "writer_for_answers": waits.answer_seconds,
            },
            advice=waits.advice(),
            # Logits move in their last bits with the rows of a product
            shadow=result.shadow_run,
            bitwise=device == "cpu" and (self._args.deterministic or not self._save.logprobs),
        )

    def _write_page(
        self, summary: Mapping[str, Any], job: JobDescription, device: str
    ) -> Path | None:
        model = "The demo checkpoint" if self._args.model is None else str(self._args.model)
        return write_report(
            Path(self._args.report),
            self._first_rows.in_order(),
            summary,
            job_options.job_media(self._args, self._media_root),
            title=self._out.name,
            subtitle=f"{model} on {'a CPU' if device == 'cpu' else device}",
            fingerprint=job.fingerprint,
        )
