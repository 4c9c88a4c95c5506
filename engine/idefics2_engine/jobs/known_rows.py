"""The first rows of a resumed job, which the journal has, and whose keys are not compared yet."""

from collections.abc import Iterable, Iterator
from itertools import islice

from idefics2_engine.jobs.job_errors import InputLostError, JobError, input_lost
from idefics2_engine.jobs.job_row import JobRow

# Events of the engine wait meanwhile, for a millisecond or two
_READ_AT_ONCE = 16


class KnownRows:
    """Rows that have records in the journal, read while the engine answers those behind them.

    A record of another version of its row does not count. Such a row is computed again, and reading
    stops while ``most_open`` of them are not finished.

    Args:
        rows: The rows, in order.
        count: How many they are.
        most_open: Most rows that are computed again at once.

    Attributes:
        num_left: Rows that were not read.
        error: Why no more can be read.
    """

    def __init__(self, rows: Iterable[JobRow] = (), count: int = 0, *, most_open: int = 1) -> None:
        self.num_left = count
        self.error: JobError | None = None
        self._rows = islice(rows, count)
        self._most_open = most_open
        self._open: set[int] = set()

    @property
    def may_read(self) -> bool:
        """Whether the next rows may be read now."""
        return self.num_left > 0 and len(self._open) < self._most_open

    def read(self) -> Iterator[JobRow]:
        """Yield the next few rows. If they cannot be read, ``error`` says why."""
        for _ in range(_READ_AT_ONCE):
            if not self.may_read:
                return
            try:
                row = next(self._rows)
            except OSError as error:
                self._end(input_lost(error))
            except JobError as error:
                self._end(error)
            except StopIteration:
                # Rows behind these were read before
                self._end(InputLostError("the input changed while it was read, and has fewer rows"))
            else:
                self.num_left -= 1
                yield row

    def open(self, row: JobRow) -> None:
        """Say that a row is computed again."""
        self._open.add(row.index)

    def close(self, row: JobRow) -> None:
        """Say that a row is finished, which may be any row of the job."""
        self._open.discard(row.index)

    def _end(self, error: JobError) -> None:
        self.num_left, self.error = 0, error
