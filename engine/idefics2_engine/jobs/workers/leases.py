"""Which rows wait and which worker has which rows, and what becomes of rows whose worker ended."""

from collections import deque
from typing import NamedTuple

# A row that was in flight at so many deaths runs with no other row
_DEATHS_BEFORE_ALONE = 2
# A worker with enough rows gets more only by this part of a lease, so that rows travel in batches
_PARTS_OF_LEASE = 4


class LeasedRow(NamedTuple):
    """A row's place among the rows of an iterator, and the row, pickled."""

    number: int
    payload: bytes


class Leases:
    """Rows that are read and not finished.

    A worker leases a share of the rows that wait, so that all workers have some at the end of the
    job. If a worker ends, its rows wait in front of all others. A row that was leased at two deaths
    runs alone, and if its worker ends again, the row is lost.

    Args:
        num_workers: Workers that share the rows.
        most_rows: Most rows of one worker.
    """

    def __init__(self, num_workers: int, most_rows: int) -> None:
        self._num_workers = num_workers
        self._most_rows = most_rows
        self._payloads: dict[int, bytes] = {}
        self._deaths: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        # Rows that must run alone
        self._suspects: deque[int] = deque()
        self._leased: list[dict[int, None]] = [{} for _ in range(num_workers)]
        self._runs_alone = [False] * num_workers

    def __len__(self) -> int:
        """Return the number of rows that are not finished."""
        return len(self._payloads)

    def add(self, row: LeasedRow) -> None:
        """Let a new row wait."""
        self._payloads[row.number] = row.payload
        self._waiting.append(row.number)

    def has_rows(self, worker: int) -> bool:
        """Return whether ``worker`` has rows."""
        return bool(self._leased[worker])

    def take(self, worker: int) -> list[LeasedRow]:
        """Lease rows to a worker that is ready; return them, none if it should have no more now."""
        leased = self._leased[worker]
        if self._runs_alone[worker]:
            return []
        if self._suspects and not leased:
            self._runs_alone[worker] = True
            return self._lease(worker, self._suspects, 1)
        share = -(-len(self._waiting) // self._num_workers)
        count = min(self._most_rows - len(leased), share)
        has_enough = len(leased) > self._most_rows // 2
        if has_enough and count < max(1, self._most_rows // _PARTS_OF_LEASE):
            return []
        return self._lease(worker, self._waiting, count)

    def finish(self, worker: int, number: int) -> int:
        """Forget a finished row; return the bytes that it had."""
        del self._leased[worker][number]
        if not self._leased[worker]:
            self._runs_alone[worker] = False
        self._deaths.pop(number, None)
        return len(self._payloads.pop(number))

    def end_worker(self, worker: int) -> list[LeasedRow]:
        """Let the rows of a worker that ended wait again; return those that are lost."""
        numbers, self._leased[worker] = list(self._leased[worker]), {}
        was_alone, self._runs_alone[worker] = self._runs_alone[worker], False
        if was_alone:
            for number in numbers:
                del self._deaths[number]
            return [LeasedRow(number, self._payloads.pop(number)) for number in numbers]
        again = []
        for number in numbers:
            self._deaths[number] = self._deaths.get(number, 0) + 1
            if self._deaths[number] >= _DEATHS_BEFORE_ALONE:
                self._suspects.append(number)
            else:
                again.append(number)
        self._waiting.extendleft(reversed(again))
        return []

    def _lease(self, worker: int, rows: deque[int], count: int) -> list[LeasedRow]:
        numbers = [rows.popleft() for _ in range(count)]
        self._leased[worker].update(dict.fromkeys(numbers))
        return [LeasedRow(number, self._payloads[number]) for number in numbers]
