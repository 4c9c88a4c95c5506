"""The rows that the engine reads: those that the journal lacks, within the window."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from idefics2_engine.jobs.job_errors import input_lost
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.row import Row


class RowRead(NamedTuple):
    """A row that was read, before the engine gets it.

    Attributes:
        row: The row.
        record: Number of its record in the journal. The engine gets the row only if it is ``None``
            and the row has no error.
    """

    row: JobRow
    record: int | None


class RowFeed(Iterator[Row]):
    """An iterator that the engine's reading thread uses, and that other threads steer.

    It ends when every row is written, since a row may have to be computed again until then. Other
    threads send it commands, because an interrupt could leave a lock locked.

    Args:
        rows: The rows from ``begin`` on, in the order of ``index``.
        begin: Index of the first one. Those before it may be unwritten, and are repeated at most.
        window: Rows that are read ahead of the first one of them that is not finished.
        in_flight: Most rows that the engine has got and that are not finished.
        find: Returns the record of a row in the journal. It is called on the reading thread.
        on_read: Called with each row that is read, on the reading thread.

    Attributes:
        num_read: Rows that were read, with those before ``begin``.
        has_ended: Whether the input has no more rows.
        read_seconds: Time in which the input was read.
        window_seconds: Time in which the reading waited for the window.
    """

    def __init__(
        self,
        rows: Iterable[JobRow],
        *,
        begin: int,
        window: int,
        in_flight: int,
        find: Callable[[JobRow], int | None],
        on_read: Callable[[RowRead], None],
    ) -> None:
        self.num_read = begin
        self.has_ended = False
        self.read_seconds = 0.0
        self.window_seconds = 0.0
        self._rows = iter(rows)
        self._begin = self._finished = begin
        self._window = window
        self._most_in_flight = in_flight
        self._find = find
        self._on_read = on_read
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Only the reading thread uses the following attributes
        self._next_row = begin
        self._num_written = 0
        self._num_in_flight = 0
        self._is_drained = False
        self._again: deque[JobRow] = deque()

    def advance(self, finished: int, written: int) -> None:
        """Say that its rows before ``finished`` are, and that all rows before ``written`` are."""
        # The reading thread is not woken for each row in front of its own
        if finished > self._finished or written > self._begin:
            self._finished = finished
            self._commands.put(partial(self._advance, finished, written))

    def finish(self) -> None:
        """Say that one more row that the engine got is finished."""
        self._commands.put(self._finish)

    def repeat(self, row: JobRow) -> None:
        """Give the engine a row that was read before and is not in flight."""
        self._commands.put(partial(self._again.append, row))

    def drain(self) -> None:
        """Read no more rows. Any thread and any signal handler may call this."""
        self._commands.put(self._drain)

    def __next__(self) -> Row:
        """Return the next row to compute, after waiting for it.

        Raises:
            InputLostError: The input cannot be read.
        """
        while self._waits_for_row():
            if self._again:
                self._num_in_flight += 1
                return self._again.popleft().to_engine()
            row = self._read()
            if row is not None:
                record = self._find(row)
                self._on_read(RowRead(row, record))
                if record is None and row.error is None:
                    self._num_in_flight += 1
                    return row.to_engine()
        raise StopIteration

    def _waits_for_row(self) -> bool:
        """Wait until a row may be read or repeated; return False if none will be."""
        while True:
            while not self._commands.empty():
                self._commands.get()()
            if self._is_drained or (self.has_ended and self._num_written >= self.num_read):
                return False
            is_window_full = self.num_read >= self._next_row + self._window
            has_room = self._num_in_flight < self._most_in_flight
            if has_room and (self._again or not (self.has_ended or is_window_full)):
                return True
            begin = time.perf_counter()
            self._commands.get()()
            if has_room and is_window_full and not self.has_ended:
                self.window_seconds += time.perf_counter() - begin

    def _read(self) -> JobRow | None:
        begin = time.perf_counter()
        try:
            row = next(self._rows, None)
        except OSError as error:
            raise input_lost(error) from error
        finally:
            self.read_seconds += time.perf_counter() - begin
        if row is None:
            self.has_ended = True
            return None
        assert row.index == self.num_read, "rows must be numbered in their order"
        self.num_read += 1
        return row

    def _advance(self, finished: int, written: int) -> None:
        self._next_row, self._num_written = finished, written

    def _finish(self) -> None:
        self._num_in_flight -= 1

    def _drain(self) -> None:
        self._is_drained = True
