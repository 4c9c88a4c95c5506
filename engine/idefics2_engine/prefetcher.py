"""Reading of rows on one thread and preparation on several, a bounded number ahead."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

Row = TypeVar("Row")
Draft = TypeVar("Draft")


class Prefetcher(Generic[Row, Draft]):
    """Calls ``read``, then ``prepare``, for each of ``rows``.

    It is a context manager that stops the threads on exit. ``read`` and ``prepare`` must not raise.

    Args:
        rows: Rows, iterated over on a separate thread.
        read: Makes a draft of a row, given its index. It runs on the same thread, in order, and
            must copy everything that the caller may change later. ``None`` skips the row.
        prepare: Called with the index and the draft on one of ``threads`` threads, in any order.
        on_end: Called once, on the reading thread, with the number of rows and the exception that
            ended them, if any.
        threads: Threads that prepare.
        ahead: Most rows that are read and not yet ``done``.
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
        self._ahead = ahead
        # An interrupt in done() could leave a semaphore's lock locked. A queue has no such lock
        self._done: SimpleQueue[None] = SimpleQueue()
        self._is_over = False
        # The source may block forever, and a daemon thread does not keep the process alive
        self._reader = threading.Thread(target=self._run, name="idefics2-read", daemon=True)

    def __enter__(self) -> Self:
        """Start reading."""
        self._reader.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop reading and drop rows whose preparation has not started, without waiting."""
        self._is_over = True
        self._done.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def done(self) -> None:
        """Mark one more row as done, so that another may be read."""
        self._done.put(None)

    def _run(self) -> None:
        count, error = 0, None
        try:
            rows = iter(self._rows)
            while True:
                if count >= self._ahead:
                    self._done.get()
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
