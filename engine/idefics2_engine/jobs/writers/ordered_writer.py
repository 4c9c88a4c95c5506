"""The output in the order of the input, from rows that finish in any order."""

from array import array
from pathlib import Path
from typing import Protocol

from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.writers.output_file import JsonlFormat, MakeFormat, OutputFile

_MISSING = 0


class Records(Protocol):
    """Reads rows of the journal."""

    def read(self, record: int, row: int) -> bytes:
        """Return the output in a record, which must be of ``row``."""


class OrderedWriter:
    """Writes each row when all rows before it are written.

    A finished row that waits is in memory if it is less than ``window`` rows ahead, and otherwise
    only in the journal, at 4 bytes a row.

    Args:
        path: The file, whose content is replaced.
        records: The journal.
        window: Rows that are kept in memory.
        make_format: Makes the format of the rows.
        files: Calls of the operating system.
    """

    def __init__(
        self,
        path: Path,
        records: Records,
        *,
        window: int,
        make_format: MakeFormat = JsonlFormat,
        files: FileOperations | None = None,
    ) -> None:
        self._records = records
        self._window = window
        self._file = OutputFile(path, files)
        self._format = make_format(self._file)
        # By row, the number of its record plus 1
        self._finished = array("I")
        self._num_finished = 0
        self._in_memory: dict[int, bytes] = {}
        self._next_row = 0

    @property
    def next_row(self) -> int:
        """The first row that is not written, which every later row waits for."""
        return self._next_row

    @property
    def num_in_memory(self) -> int:
        """Rows that wait in memory."""
        return len(self._in_memory)

    def first_unfinished(self, begin: int) -> int:
        """Return the first row from ``begin`` on that is not finished."""
        while begin < len(self._finished) and self._finished[begin] != _MISSING:
            begin += 1
        return begin

    def finish_row(self, row: int, record: int, out: bytes | None = None) -> None:
        """Write a row and those that waited for it, or let it wait.

        Args:
            row: Place of the row among the job's rows, from 0.
            record: Number of its record in the journal.
            out: Its output if it is at hand, equal to that in the record.

        Raises:
            ValueError: The row was finished before.
            JobError: A record has been damaged.
            OSError: A file cannot be read or written.
        """
        if row >= len(self._finished):
            self._finished.frombytes(bytes(4 * (row + 1 - len(self._finished))))
        if self._finished[row] != _MISSING:
            raise ValueError(f"row {row} must be finished once, got it again")
        self._finished[row] = record + 1
        self._num_finished += 1
        if out is not None and row < self._next_row + self._window:
            self._in_memory[row] = out
        while self._next_row < len(self._finished) and self._finished[self._next_row] != _MISSING:
            self._write_next()

    def complete(self, num_rows: int) -> WrittenOutput:
        """Sync and close the file, which has all rows.

        Raises:
            ValueError: Rows are missing, or there are more.
            OSError: The file cannot be written.
        """
        if not self._next_row == self._num_finished == num_rows:
            raise ValueError(
                f"{num_rows} rows must be written, got {self._next_row} in order "
                f"of {self._num_finished} that are finished"
            )
        self._format.finish()
        self._file.sync()
        self._file.close()
        return WrittenOutput(num_rows, self._file.size, self._file.sha256)

    def close(self) -> None:
        """Close the file as it is. A second call does nothing."""
        self._file.close()

    def _write_next(self) -> None:
        row = self._next_row
        out = self._in_memory.pop(row, None)
        if out is None:
            out = self._records.read(self._finished[row] - 1, row)
        self._format.write_row(out)
        self._next_row += 1
