"""Axes: where a value is, and the ticks."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_MOST_STEPS = 6
# Steps within a power of ten, and how many ticks there must be at least. The first that fits counts.
_LOG_STEPS = (((1,), 4), ((1, 2, 5), 3))


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
    step = _step(most)
    count = math.ceil(most / step - 1e-9)
    return Axis(label, 0.0, count * step, tuple(i * step for i in range(count + 1)))


def log_axis(label: str, values: Iterable[float], ticks: Sequence[float] = ()) -> Axis:
    """Return a logarithmic axis around positive ``values``, with round ticks unless some are given."""
    known = list(values) or [1.0, 10.0]
    low, high = min(known) / 1.25, max(known) * 1.25
    ticks = [t for t in ticks if low <= t <= high] or _log_ticks(low, high)
    return Axis(label, low, high, tuple(ticks), is_log=True)


def tick_text(value: float) -> str:
    """Return how a tick is written."""
    return f"{value:,.6g}"


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps, least in _LOG_STEPS:
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= least:
            return ticks
    # So narrow an axis has round numbers at equal distances
    step = _step(high - low)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _step(length: float) -> float:
    """Return the least round number of which ``length`` has at most ``_MOST_STEPS``."""
    return next(s for s in _round_numbers(length / _MOST_STEPS) if length / s <= _MOST_STEPS)


def _round_numbers(begin: float) -> Iterator[float]:
    power = math.floor(math.log10(begin))
    return (step * 10.0**p for p in range(power, power + 3) for step in (1, 2, 5))
