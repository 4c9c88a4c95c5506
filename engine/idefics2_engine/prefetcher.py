"""Reading of rows on one thread and preparation on several, within bounds of rows and of bytes."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

from idefics2_engine.images.tiling import Tile

Row = TypeVar("Row")
Draft = TypeVar("Draft")

# A thread that has prepared a row finds another one
_PREPARING_PER_THREAD = 2


class Prefetcher(Generic[Row, Draft]):
    """Reads ``rows`` and prepares them, ahead of their use.

    It is a context manager that stops the threads on exit. The reading thread counts rows and
    bytes. Other threads send it commands, because an interrupt could leave a lock locked.

    Args:
        rows: Rows, iterated over on the reading thread.
        on_end: Called when ``has_ended`` becomes true, on the thread that made it so.
        threads: Threads that prepare.
        ahead: Most rows that are read and not yet ``done``.
        max_bytes: Rows are read while those that are not ``done`` hold fewer bytes of tiles. Rows
            that are being prepared, at most two a thread, do not count yet.
        wait_turn: Called on these threads before each row, to let others go first.

    Attributes:
        count: Rows read so far.
        has_ended: Whether no more rows are read.
        error: The exception that ended the rows. None if they ended normally or were drained.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        on_end: Callable[[], None],
        *,
        threads: int,
        ahead: int,
        max_bytes: int,
        wait_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.count = 0
        self.has_ended = False
        self.error: BaseException | None = None
        self._rows = rows
        self._on_end = on_end
        self._pool = ThreadPoolExecutor(threads, "idefics2-prepare")
        self._most_preparing = _PREPARING_PER_THREAD * threads
        self._ahead = ahead
        self._max_bytes = max_bytes
        self._wait_turn = wait_turn
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Only the reading thread uses the following attributes
        self._num_done = 0
        self._num_preparing = 0
        self._held = HeldTiles()

    def start(
        self, read: Callable[[int, Row], Draft | None], prepare: Callable[[int, Draft], None]
    ) -> Self:
        """Start reading; called once. ``read`` and ``prepare`` must not raise.

        Args:
            read: Makes a draft of a row, given its index. It runs on the reading thread, in order,
                and must copy everything that the caller may change later. ``None`` skips the row.
            prepare: Called with the index and the draft on one of the threads, in any order. It
                calls ``hold``.
        """
        # The source may block forever, and a daemon thread does not keep the process alive
        threading.Thread(
            target=self._run, args=(read, prepare), name="idefics2-read", daemon=True
        ).start()
        return self

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop reading and drop rows whose preparation has not started, without waiting."""
        self.drain()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def hold(self, tiles: Sequence[Tile]) -> None:
        """Count ``tiles`` as held by a row that is prepared and not ``done``."""
        self._commands.put(partial(self._held.add, tiles))

    def done(self, tiles: Sequence[Tile] = ()) -> None:
        """Mark one more row as done, which held ``tiles``."""
        self._commands.put(partial(self._count_done, tiles))

    def drain(self) -> None:
        """Read no more rows; idempotent, and callable in any thread or signal handler.

        A row that ``rows`` yields at this moment or later is dropped.
        """
        self.has_ended = True
        # The reading thread may wait for a command
        self._commands.put(_do_nothing)
        self._on_end()

    def _run(
        self, read: Callable[[int, Row], Draft | None], prepare: Callable[[int, Draft], None]
    ) -> None:
        def prepare_and_count(index: int, draft: Draft) -> None:
            try:
                self._wait_turn()
                prepare(index, draft)
            finally:
                self._commands.put(self._count_prepared)

        try:
            rows = iter(self._rows)
            while self._waits_for_room():
                try:
                    row = next(rows)
                except StopIteration:
                    break
                if self.has_ended:
                    break
                self._wait_turn()
                index, draft = self.count, read(self.count, row)
                self.count += 1
                if draft is not None:
                    self._num_preparing += 1
                    self._pool.submit(prepare_and_count, index, draft)
        except BaseException as raised:
            if not self.has_ended:
                self.error = raised
        self.has_ended = True
        self._on_end()

    def _waits_for_room(self) -> bool:
        """Wait until another row may be read; return False if none will be."""
        while True:
            while not self._commands.empty():
                self._commands.get()()
            if self.has_ended:
                return False
            if (
                self.count - self._num_done < self._ahead
                and self._num_preparing < self._most_preparing
                and self._held.num_bytes < self._max_bytes
            ):
                return True
            self._commands.get()()

    def _count_prepared(self) -> None:
        self._num_preparing -= 1

    def _count_done(self, tiles: Sequence[Tile]) -> None:
        self._num_done += 1
        self._held.remove(tiles)


class HeldTiles:
    """The tiles that rows hold.

    Rows with the same image file share tiles, which count once.

    Attributes:
        num_bytes: Bytes of their pixels.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._holders: Counter[Tile] = Counter()

    def add(self, tiles: Sequence[Tile]) -> None:
        """Add the tiles of a row."""
        for tile in tiles:
            self._holders[tile] += 1
            if self._holders[tile] == 1:
                self.num_bytes += tile.pixels.nbytes

    def remove(self, tiles: Sequence[Tile]) -> None:
        """Remove the tiles of a row that were added."""
        for tile in tiles:
            self._holders[tile] -= 1
            if not self._holders[tile]:
                del self._holders[tile]
                self.num_bytes -= tile.pixels.nbytes


def _do_nothing() -> None:
    pass
