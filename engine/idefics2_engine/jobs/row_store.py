"""The journal of a job and its ordered output, as one place to which finished rows go."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from idefics2_engine.jobs.job_errors import JobError, OutputLostError, reason_of
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.store.file_operations import FileOperations
from idefics2_engine.jobs.store.job_folder import JobFolder
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.store.journal import Journal, Recovery
from idefics2_engine.jobs.writers.ordered_writer import OrderedWriter
from idefics2_engine.jobs.writers.output_file import MakeFormat
from idefics2_engine.model_files import printable_path


class RowStore:
    """Journals finished rows, and writes the output in order. It is a context manager.

    One thread uses it, and other threads may call ``find``. After the output cannot be written, rows
    are still journalled.

    Args:
        folder: The job's folder, which is locked.
        rows_in_memory: Most finished rows that wait in memory.
        make_format: Makes the format of the output.
        files: Calls of the operating system.
        clock: Seconds that only grow.

    Raises:
        OutputLostError: The journal or the output cannot be opened.
    """

    def __init__(
        self,
        folder: JobFolder,
        *,
        rows_in_memory: int,
        make_format: MakeFormat,
        files: FileOperations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._is_output_lost = False
        with ExitStack() as stack:
            with lost_output(folder.path):
                self._journal = stack.enter_context(Journal(folder.path, files=files, clock=clock))
            with lost_output(folder.partial):
                self._writer = OrderedWriter(
                    folder.partial,
                    self._journal,
                    window=rows_in_memory,
                    make_format=make_format,
                    files=files,
                )
            stack.enter_context(closing(self._writer))
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Sync and close the files, unless an error is on its way that says more."""
        try:
            with lost_output(self._folder.path):
                self._open.close()
        except OutputLostError:
            if error is None:
                raise

    @property
    def path(self) -> Path:
        """The folder of the journal."""
        return self._folder.path

    @property
    def recovered(self) -> Recovery:
        """What was found in the journal on start."""
        return self._journal.recovered

    @property
    def first_missing(self) -> int:
        """The first row without a record in the journal. Those before it may have other keys."""
        return self._journal.first_missing

    @property
    def next_row(self) -> int:
        """The first row that is not written."""
        return self._writer.next_row

    def first_unfinished(self, begin: int) -> int:
        """Return the first row from ``begin`` on that is not finished."""
        return self._writer.first_unfinished(begin)

    @property
    def num_in_memory(self) -> int:
        """Finished rows that wait in memory."""
        return self._writer.num_in_memory

    def find(self, row: JobRow) -> int | None:
        """Return the number of the newest record of ``row``, if there is one."""
        return self._journal.find(row.index, row.key)

    def read(self, row: JobRow, record: int) -> bytes:
        """Return the output in a record of ``row``; raise ``OutputLostError`` if it is damaged."""
        with lost_output(self._folder.path):
            return self._journal.read(record, row.index)

    def add(self, row: JobRow, out: bytes) -> None:
        """Journal and write the output of ``row``.

        Raises:
            OutputLostError: It is not journalled, or the output cannot be written. The journal may
                be used further.
        """
        with lost_output(self._folder.path):
            record = self._journal.append(row.index, row.key, out)
        self.add_record(row, record, out)

    def add_record(self, row: JobRow, record: int, out: bytes) -> None:
        """Write the output of ``row``, which a record has.

        Raises:
            OutputLostError: The output cannot be written. Later calls do nothing.
        """
        if self._is_output_lost:
            return
        try:
            with lost_output(self._folder.partial):
                self._writer.finish_row(row.index, record, out)
        except OutputLostError:
            self._is_output_lost = True
            raise

    def tick(self) -> None:
        """Sync the journal if it is time."""
        with lost_output(self._folder.path):
            self._journal.tick()

    def publish(self) -> WrittenOutput:
        """Complete the output, which has all rows, and give it its name.

        Raises:
            OutputLostError: The output cannot be written, or another file is at its place.
        """
        with lost_output(self._folder.out):
            output = self._writer.complete(self._writer.next_row)
            self._journal.sync()
            self._folder.publish(output)
        return output


class lost_output:  # noqa: N801
    """Raises ``OutputLostError`` about ``path`` for errors of the operating system and of a job.

    It is a context manager, and a class because each row enters several of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Replace an error."""
        if isinstance(error, OSError):
            raise output_lost(self._path, error) from error
        if isinstance(error, JobError) and not isinstance(error, OutputLostError):
            raise OutputLostError(str(error)) from error


def output_lost(path: Path, error: OSError) -> OutputLostError:
    """Return the error of a file that cannot be written: that of ``error``, or ``path``."""
    name = error.filename if isinstance(error.filename, str | Path) else path
    return OutputLostError(f"{printable_path(Path(name))}: cannot be written: {reason_of(error)}")
