"""Axes: where a value is, and the ticks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# From this ratio of the largest to the smallest value on, a logarithmic axis has powers of ten alone
_DECADES = 80
_MOST_STEPS = 6


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, linear or logarithmic."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where ``value`` is: 0 at the begin of the axis, 1 at its end."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis from 0 to a round number beyond the largest of ``values``."""
    most = max(values, default=0.0) or 1.0
    step = next(s for s in _round_numbers(most / _MOST_STEPS) if most / s <= _MOST_STEPS)
    count = math.ceil(most / step - 1e-9)
    return Axis(label, 0.0, count * step, tuple(i * step for i in range(count + 1)))


def log_axis(label: str, values: Iterable[float], ticks: Sequence[float] = ()) -> Axis:
    """Return a logarithmic axis around positive ``values``, with round ticks unless some are given."""
    known = list(values) or [1.0, 10.0]
    low, high = min(known) / 1.25, max(known) * 1.25
    if not ticks:
        steps = (1,) if high / low > _DECADES else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
    return Axis(label, low, high, tuple(t for t in ticks if low <= t <= high), is_log=True)


def tick_text(value: float) -> str:
    """Return how a tick is written."""
    return f"{value:,.6g}"


def _round_numbers(begin: float) -> Iterable[float]:
    power = math.floor(math.log10(begin))
    return (step * 10.0**p for p in range(power, power + 3) for step in (1, 2, 5))
