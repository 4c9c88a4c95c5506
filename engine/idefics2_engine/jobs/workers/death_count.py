"""When workers die so often that one of them, or the whole job, cannot go on."""

_MOST_DEATHS = 3
_MOST_LOST_ROWS = 8


class DeathCount:
    """Counts deaths of workers, in total and since the last answer.

    A worker that died three times in a row before its engine was built is given up, because its GPU
    may be broken while others are not.

    Args:
        num_workers: Workers of the pool.

    Attributes:
        total: All deaths.
    """

    def __init__(self, num_workers: int) -> None:
        self.total = 0
        self._without_answer = [0] * num_workers
        self._without_engine = [0] * num_workers
        self._lost_rows = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether every worker died three times, or eight rows were lost, without an answer."""
        is_left = [not self.is_given_up(worker) for worker in range(len(self._without_engine))]
        deaths = [count for count, left in zip(self._without_answer, is_left, strict=True) if left]
        return min(deaths, default=_MOST_DEATHS) >= _MOST_DEATHS or (
            self._lost_rows >= _MOST_LOST_ROWS
        )

    def is_given_up(self, worker: int) -> bool:
        """Return whether a worker should not be started again."""
        return self._without_engine[worker] >= _MOST_DEATHS

    def died(self, worker: int, *, was_ready: bool) -> None:
        """Count the death of a worker, whose engine was built or was not."""
        self.total += 1
        self._without_answer[worker] += 1
        self._without_engine[worker] = 0 if was_ready else self._without_engine[worker] + 1

    def row_lost(self) -> None:
        """Count a row that ran alone when its worker died, which explains the deaths before."""
        self._lost_rows += 1
        self._without_answer = [0] * len(self._without_answer)

    def row_answered(self) -> None:
        """Begin to count again."""
        self._lost_rows = 0
        self._without_answer = [0] * len(self._without_answer)
