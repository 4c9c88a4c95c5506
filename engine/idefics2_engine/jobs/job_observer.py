"""What a run tells while it goes on: its progress, and a line of statistics for each row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from idefics2_engine.jobs.job_result import RowCounts
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.outputs import RequestOutput


class FinishedRow(NamedTuple):
    """A row that is journalled.

    Attributes:
        row: The row.
        out: Its row of the output.
        answer: What the engine said. ``None`` if the journal had the row, or if it is a bad row.
        attempts: How often the engine was asked in this run.
    """

    row: JobRow
    out: Mapping[str, Any]
    answer: RequestOutput | None
    attempts: int


class JobObserver:
    """Is told what happens, on the thread that runs the job. Each method may do nothing.

    An ``OSError`` of a method ends the job as one of the output does.
    """

    def begin(self, counts: RowCounts) -> None:
        """Begin with ``counts``, which the run changes."""

    def load(self, engine: RowEngine) -> None:
        """The engine is there and has no rows yet."""

    def answer_row(self, row: JobRow, output: RequestOutput) -> None:
        """A row was answered without an error, and is not journalled yet."""

    def finish_row(self, finished: FinishedRow) -> None:
        """A row was journalled or found in the journal. Its counts are up to date."""

    def tick(self) -> None:
        """A second went by without a row."""

    def end(self) -> None:
        """The run finishes no more rows."""
