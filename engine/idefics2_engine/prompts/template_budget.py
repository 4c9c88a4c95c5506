"""Limits of rendering a chat template: a clock, and bounds on values before they are computed.

Sizes are in characters; an element of a container counts as eight. An estimate bounds the size of a
result by the operands, in any order. For an operation without a table entry, it is the product of
lengths and numbers, which bounds every repetition and padding.
"""

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import jinja2
from jinja2.runtime import LoopContext

from idefics2_engine.prompts.text_slots import LONGEST_TEXT, Slot

# The longest time of one rendering. An ordinary conversation takes less than a thousandth of it
SECONDS = 0.5
# A value may have this many characters, and _SIZE_FACTOR more for each one of the conversation. All
# values of a rendering may together have _TOTAL_FACTOR times as many.
_BASE_SIZE = 2**20
_SIZE_FACTOR = 16
_TOTAL_FACTOR = 32
# Integers may have so many bits
MAX_BITS = 2**15
# Python's default recursion limit bounds the depth of nested values
_MAX_DEPTH = 1000
# An element of a container costs so much in addition to its own size
_ELEMENT_SIZE = 8


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template exceeded its limit of time or memory."""


@dataclass
class Budget:
    """The rest of the limits of one rendering.

    Attributes:
        max_size: Most characters of one value. All values together may have a multiple of it.
        taken: Characters of all values so far.
        cpu: CPU time of the thread at the start, in seconds.
        deadline: Wall-clock time of the end, in seconds.
    """

    max_size: int
    taken: float = 0
    cpu: float = field(default_factory=lambda: time.thread_time())
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    @classmethod
    def for_input(cls, size: int) -> "Budget":
        """Return the budget of rendering a conversation of ``size`` characters."""
        return cls(_BASE_SIZE + _SIZE_FACTOR * size)

    def look(self) -> None:
        """Raise ``TemplateLimitError`` if the wall-clock and CPU time are both over."""
        if time.monotonic() > self.deadline and time.thread_time() - self.cpu > SECONDS:
            raise TemplateLimitError(f"must take at most {SECONDS} s")

    def allow(self, size: float) -> None:
        """Raise ``TemplateLimitError`` if the time is over or a value of ``size`` is too large.

        Freed values still count.
        """
        self.look()
        # A template can make a NaN, which must fail this comparison
        if not size <= self.max_size:
            raise TemplateLimitError(f"a value must have a size of at most {self.max_size}")
        self.taken += size
        if self.taken > _TOTAL_FACTOR * self.max_size:
            raise TemplateLimitError(
                f"values must have a size of at most {_TOTAL_FACTOR * self.max_size} together"
            )

    def size(self, value: Any) -> int:
        """Return the size of ``value``, counting shared parts each time, up to the limit."""
        total = 0
        rest: list[Any] = [value]
        while rest and total <= self.max_size:
            value = rest.pop()
            if isinstance(value, str):
                total += len(value)
            elif isinstance(value, int):
                total += value.bit_length() // 8
            elif isinstance(value, Mapping):
                total += 2 * _ELEMENT_SIZE * len(value)
                rest += value.keys()
                rest += value.values()
            elif isinstance(value, range):
                total += _ELEMENT_SIZE * len(value)
            elif isinstance(value, _MaterializedIterator):
                total += value.size
            elif type(value) is Slot:
                total += LONGEST_TEXT
            elif isinstance(value, _CONTAINERS):
                total += _ELEMENT_SIZE * len(value)
                rest += value
        return total

    def materialize(self, value: object) -> object:
        """Return ``value``, or for a lazy iterator one of known size over its items."""
        if not isinstance(value, Iterator) or isinstance(
            value, _MaterializedIterator | LoopContext
        ):
            return value
        total = 0
        items = []
        for item in value:
            size = _ELEMENT_SIZE + self.size(item)
            self.allow(size)
            total += size
            items.append(item)
        self.allow(total)
        return _MaterializedIterator(iter(items), total)


@dataclass
class _MaterializedIterator:
    """An iterator of known size that, like the lazy one it replaces, is true and has no length."""

    items: Iterator[Any]
    size: int

    def __iter__(self) -> Iterator[Any]:
        return self.items

    def __next__(self) -> Any:
        return next(self.items)


_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)
current: ContextVar[Budget] = ContextVar("budget of the rendering")
"""The budget of the template that the current thread renders."""

Estimate = Callable[[Budget, list[Any]], float]


def sum_of_sizes(budget: Budget, values: list[Any]) -> float:
    """Bound results that are at most as long as the operands together."""
    return sum(budget.size(value) for value in values)


def _extent(budget: Budget, value: Any) -> float:
    return abs(value) if is_number(value) else budget.size(value)


def _padded(budget: Budget, values: list[Any]) -> float:
    return sum(_extent(budget, value) for value in values)


def product_of_sizes(budget: Budget, values: list[Any]) -> float:
    """Bound repetition and padding by the product of lengths and numbers."""
    return math.prod(1 + _extent(budget, value) for value in values)


def no_size(budget: Budget, values: list[Any]) -> float:
    """Return 0 for results without new memory."""
    return 0


def _replaced(budget: Budget, values: list[Any]) -> float:
    text, *rest = values
    words = [value for value in rest if isinstance(value, str)]
    if not isinstance(text, str) or len(words) < 2:
        return product_of_sizes(budget, values)
    return len(text) + max(text.count(word) for word in words) * sum(map(len, words))


def formatted(budget: Budget, values: list[Any]) -> float:
    """Bound ``text % values``, widths included."""
    text, *rest = str(values[0]), *values[1:]
    width = _largest_number(text)
    # An asterisk takes a width from the values
    if "*" in text:
        width += product_of_sizes(budget, [number for value in rest for number in _numbers(value)])
    return len(text) + text.count("%") * (width + sum_of_sizes(budget, rest))


def _braced(budget: Budget, values: list[Any]) -> float:
    """Bound ``text.format(*values)``, widths included; a width from a value is unbounded."""
    text, *rest = str(values[0]), *values[1:]
    try:
        nested = any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(text))
    except ValueError:
        # The call of format will raise it
        return 0
    fields = text.count("{") * (_largest_number(text) + sum_of_sizes(budget, rest))
    return math.inf if nested else len(text) + fields


def _largest_number(text: str) -> float:
    digits: int = max((len(number) for number in re.findall(r"\d+", text)), default=0)
    return float(10 ** min(digits, 18))


def _encoded(budget: Budget, values: list[Any]) -> float:
    """Bound ``tojson`` except the indent of deep values, which is written piece by piece."""
    value, *options = values
    indent = max((_extent(budget, option) for option in options), default=0)
    return (
        budget.size(value) * (1 + sum_of_sizes(budget, options) / _ELEMENT_SIZE)
        + _MAX_DEPTH * indent
    )


def _summed(budget: Budget, values: list[Any]) -> float:
    """Bound ``sum``, which takes quadratic time unless it starts with a number."""
    return math.inf if any(isinstance(value, _CONTAINERS) for value in values[1:]) else 0


def _numbers(value: object) -> list[Any]:
    items = value.values() if isinstance(value, Mapping) else value
    return [item for item in (items if isinstance(items, Iterable) else [items]) if is_number(item)]


def is_number(value: object) -> bool:
    """Return whether ``value`` is a number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(**names: tuple[Estimate, str]) -> dict[str, Estimate]:
    return {name: estimate for estimate, listed in names.values() for name in listed.split()}


METHODS = _table(
    linear=(
        sum_of_sizes,
        "count endswith find get index partition removeprefix removesuffix split startswith",
    ),
    padded=(_padded, "center ljust rjust zfill"),
    braced=(_braced, "format format_map"),
    replaced=(_replaced, "replace"),
)
FILTERS = _table(
    free=(no_size, "abs attr count d default first last length max min random safe"),
    linear=(
        sum_of_sizes,
        "capitalize dictsort e escape filesizeformat float forceescape groupby int items list "
        "lower map reject rejectattr reverse select selectattr sort string title truncate unique "
        "upper urlencode wordcount",
    ),
    multiplied=(product_of_sizes, "batch indent join round slice trim"),
    padded=(_padded, "center"),
    formatted=(formatted, "format"),
    replaced=(_replaced, "replace"),
    encoded=(_encoded, "tojson"),
    summed=(_summed, "sum"),
)
"""All available filters. Jinja's others are for web pages, and some take quadratic time."""
