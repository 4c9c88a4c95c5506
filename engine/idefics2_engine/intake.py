"""Rows prepared in threads while the model runs: read lazily, a bounded number ahead, taken in order."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

from idefics2_engine.errors import Idefics2Error

Row = TypeVar("Row")
Prepared = TypeVar("Prepared")


class Intake(Generic[Row, Prepared]):
    """Calls ``prepare`` on each of ``rows`` in ``threads``; use as a context, which ends the threads."""

    def __init__(
        self,
        rows: Iterable[Row],
        prepare: Callable[[Row], Prepared],
        threads: int,
        ahead: int,
    ) -> None:
        self._rows = iter(rows)
        self._prepare = prepare
        self._ahead = ahead  # rows that are read and not taken
        self._pool = ThreadPoolExecutor(threads, "intake")
        self._futures: deque[tuple[Row, Future[Prepared]]] = deque()
        self._ended = False

    def __enter__(self) -> Self:
        """Read the first rows."""
        self._fill()
        return self

    def __exit__(self, *_error: object) -> None:
        """Abandon what nobody took."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def is_empty(self) -> bool:
        """Whether every row has been taken."""
        return self._ended and not self._futures

    def take(self, wait: bool) -> tuple[Row, Prepared | Idefics2Error] | None:
        """Return the next row with what was made of it, or with what is wrong with it.

        ``None`` if there is none left or, unless ``wait``, if it is not ready.

        Raises:
            Exception: What reading ``rows`` raised, or ``prepare`` if it is no ``Idefics2Error``.
        """
        if not self._futures or not (wait or self._futures[0][1].done()):
            return None
        row, future = self._futures.popleft()
        self._fill()
        try:
            return row, future.result()
        except Idefics2Error as error:
            return row, error

    def _fill(self) -> None:
        while not self._ended and len(self._futures) < self._ahead:
            try:
                row = next(self._rows)
            except StopIteration:
                self._ended = True
            else:
                self._futures.append((row, self._pool.submit(self._prepare, row)))
