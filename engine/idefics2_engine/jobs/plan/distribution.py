"""The distribution of a whole number over the rows of a job."""

from collections import Counter


class Distribution:
    """Counts values, exactly, in memory that grows with the different values only."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: int, times: int = 1) -> None:
        """Count ``value``."""
        self._counts[value] += times

    @property
    def count(self) -> int:
        """How many values were counted."""
        return self._counts.total()

    @property
    def total(self) -> int:
        """The sum of all values."""
        return sum(value * times for value, times in self._counts.items())

    def quantile(self, percent: int) -> int:
        """Return the smallest value that at least ``percent`` % of the values do not exceed.

        It is 0 if there are none, and the smallest value for 0 %.
        """
        rank = max(1, -(-self.count * percent // 100))
        for value in sorted(self._counts):
            rank -= self._counts[value]
            if rank <= 0:
                return value
        return 0

    def largest_sum(self, count: int) -> int:
        """Return the sum of the ``count`` largest values, or of all if there are fewer."""
        total = 0
        for value in sorted(self._counts, reverse=True):
            taken = min(count, self._counts[value])
            total, count = total + value * taken, count - taken
        return total

    def to_dict(self) -> dict[str, int]:
        """Return total, min, median, p95 and max for JSON."""
        return {
            "total": self.total,
            "min": self.quantile(0),
            "median": self.quantile(50),
            "p95": self.quantile(95),
            "max": self.quantile(100),
        }
