"""Reading of rows on a thread of its own, within bounds of rows and bytes."""

import pickle
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from idefics2_engine.errors import PromptError
from idefics2_engine.jobs.workers.leases import LeasedRow
from idefics2_engine.outputs import RequestOutput, failed_output
from idefics2_engine.row import Row


class ReadAhead:
    """Reads rows ahead of their answers and pickles them.

    Other threads send commands to the reading thread, because an interrupt could leave a lock
    locked.

    Args:
        rows: The rows, iterated over on the reading thread.
        put: Called with each row, with the output of a row that cannot be pickled, and with None
            when ``has_ended`` becomes true.
        ahead: Most rows that are read and not ``done``.
        max_bytes: Rows are read while those that are not ``done`` have fewer bytes.

    Attributes:
        count: Rows read so far.
        has_ended: Whether no more rows are read.
        error: The exception that ended the rows. None if they ended normally or were drained.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        put: Callable[[LeasedRow | RequestOutput | None], None],
        *,
        ahead: int,
        max_bytes: int,
    ) -> None:
        self.count = 0
        self.has_ended = False
        self.error: BaseException | None = None
        self._rows = rows
        self._put = put
        self._ahead = ahead
        self._max_bytes = max_bytes
        # Bytes of a row that is done. None if there is no row and the thread should look around
        self._commands: SimpleQueue[int | None] = SimpleQueue()
        # Only the reading thread uses the following attributes
        self._num_done = 0
        self._num_bytes = 0

    def start(self) -> None:
        """Start reading; called once."""
        # The source may block forever, and a daemon thread does not keep the process alive
        threading.Thread(target=self._run, name="idefics2-read", daemon=True).start()

    def done(self, num_bytes: int) -> None:
        """Mark one more row as done, which had so many bytes."""
        self._commands.put(num_bytes)

    def drain(self) -> None:
        """Read no more rows; idempotent, and callable in any thread or signal handler.

        A row that ``rows`` yields at this moment or later is dropped.
        """
        self.has_ended = True
        self._commands.put(None)
        self._put(None)

    def _run(self) -> None:
        try:
            rows = iter(self._rows)
            while self._waits_for_room():
                try:
                    row = next(rows)
                except StopIteration:
                    break
                if self.has_ended:
                    break
                number = self.count
                self.count += 1
                self._put(self._pickled(number, row))
        except BaseException as raised:
            if not self.has_ended:
                self.error = raised
        self.has_ended = True
        self._put(None)

    def _pickled(self, number: int, row: Row) -> LeasedRow | RequestOutput:
        try:
            payload = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            text = f"prompt must be data that can be sent to a worker, got {type(error).__name__}"
            return failed_output(str(number), PromptError(text), row.key)
        self._num_bytes += len(payload)
        return LeasedRow(number, payload)

    def _waits_for_room(self) -> bool:
        """Wait until another row may be read; return False if none will be."""
        while True:
            while not self._commands.empty():
                self._count_done(self._commands.get())
            if self.has_ended:
                return False
            if self.count - self._num_done < self._ahead and self._num_bytes < self._max_bytes:
                return True
            self._count_done(self._commands.get())

    def _count_done(self, num_bytes: int | None) -> None:
        if num_bytes is not None:
            self._num_done += 1
            self._num_bytes -= num_bytes
