"""Rows read on one thread and prepared on several, a bounded number ahead of their use."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Row = TypeVar("Row")
Draft = TypeVar("Draft")


class Prefetcher(Generic[Row, Draft]):
    """Passes each of ``rows`` through ``read`` and ``prepare``.

    Use as a context, which ends the threads.

    Args:
        rows: Are iterated over on a thread of their own, which also calls ``read``, in order.
        read: Makes a draft of a row by its number. It must copy what the source of the rows may
            change later.
        prepare: Is called with the number and the draft on one of ``threads`` threads, in any
            order.
        on_end: Is called once, on the reading thread, with how many rows there were, and what the
            source raised if it did not simply end.
        threads: That prepare.
        ahead: Rows that are read and not yet ``done``.

    ``read`` and ``prepare`` must not raise; ``read`` returns ``None`` for a row that is not to be
    prepared.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        read: Callable[[int, Row], Draft | None],
        prepare: Callable[[int, Draft], None],
        on_end: Callable[[int, BaseException | None], None],
        *,
        threads: int,
        ahead: int,
    ) -> None:
        self._rows = rows
        self._read = read
        self._prepare = prepare
        self._on_end = on_end
        self._pool = ThreadPoolExecutor(threads, "idefics2-prepare")
        self._room = threading.Semaphore(ahead)
        self._is_over = False
        # A source may wait for ever: a process must be able to end without it
        self._reader = threading.Thread(target=self._run, name="idefics2-read", daemon=True)

    def __enter__(self) -> Self:
        """Begin to read."""
        self._reader.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Read no more and drop what is not being prepared; nothing is waited for."""
        self._is_over = True
        self._room.release()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def done(self) -> None:
        """Say that one more row is done with, so that another may be read."""
        self._room.release()

    def _run(self) -> None:
        count, error = 0, None
        try:
            rows = iter(self._rows)
            while True:
                self._room.acquire()
                if self._is_over:
                    return
                try:
                    row = next(rows)
                except StopIteration:
                    break
                if (draft := self._read(count, row)) is not None and not self._is_over:
                    self._pool.submit(self._prepare, count, draft)
                count += 1
        except BaseException as raised:
            error = raised
        if not self._is_over:
            self._on_end(count, error)
