"""When workers die so often that the job cannot go on."""

_MOST_DEATHS = 3
_MOST_LOST_ROWS = 8


class DeathCount:
    """Counts deaths of workers since the last answer.

    Args:
        num_workers: Workers of the pool.

    Attributes:
        total: All deaths.
    """

    def __init__(self, num_workers: int) -> None:
        self.total = 0
        self._in_a_row = [0] * num_workers
        self._lost_rows = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether every worker died three times, or eight rows were lost, without an answer."""
        return min(self._in_a_row) >= _MOST_DEATHS or self._lost_rows >= _MOST_LOST_ROWS

    def died(self, worker: int) -> None:
        """Count the death of a worker."""
        self.total += 1
        self._in_a_row[worker] += 1

    def row_lost(self) -> None:
        """Count a row that ran alone when its worker died, which explains the deaths before."""
        self._lost_rows += 1
        self._in_a_row = [0] * len(self._in_a_row)

    def row_answered(self) -> None:
        """Begin to count again."""
        self._lost_rows = 0
        self._in_a_row = [0] * len(self._in_a_row)
