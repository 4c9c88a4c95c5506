"""What a run asks of its input, and of the encoding of its rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.writers.output_file import MakeFormat
from idefics2_engine.outputs import RequestOutput


class JobRows(Protocol):
    """The rows of a job."""

    @property
    def files(self) -> Sequence[Path]:
        """Local files that the rows come from."""

    @property
    def can_skip(self) -> bool:
        """Whether ``rows`` has rows before ``begin`` for much less than it costs to read them."""

    def rows(self, *, begin: int = 0) -> Iterator[JobRow]:
        """Return the rows from index ``begin`` on, read lazily; every call returns the same ones.

        Several iterators may be used at once, on other threads than the one that called this.
        """


class RowEncoding(Protocol):
    """Encodes rows of the output, which depend on the row and its answer alone."""

    @property
    def make_format(self) -> MakeFormat:
        """Makes the format of the output from encoded rows."""

    def answer(self, row: JobRow, output: RequestOutput) -> bytes:
        """Return the JSON object of an answered row, on one line."""

    def error(self, row: JobRow, error: RowError) -> bytes:
        """Return the JSON object of an error row, on one line."""

    def error_of(self, error: Idefics2Error) -> RowError:
        """Return what an error row says about an error of the engine."""
