"""Validation of arguments: kinds of values, and dataclasses whose fields declare a kind."""

import math
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from idefics2_engine.errors import Idefics2Error, short_repr

Kind = Callable[[object], Any]
"""Converts a value to Python's built-in types, or raises ``MismatchError``."""


class MismatchError(Exception):
    """A value is not of its kind; the arguments are what was wanted and what was got."""

    def __init__(self, wanted: str, got: str) -> None:
        super().__init__(wanted, got)
        self.wanted = wanted
        self.got = got


def checked(kind: Kind, default: Any = MISSING, **options: Any) -> Any:
    """Return a dataclass field for values of ``kind``; ``options`` are passed to ``field``."""
    return field(default=default, metadata={"kind": kind}, **options)


def check_fields(instance: Any, error: type[Idefics2Error]) -> None:
    """Check every field of a frozen dataclass and store the values that its kinds return.

    Raises:
        Idefics2Error: A field is not of its kind; an error of the class ``error``.
    """
    for one in fields(instance):
        value = check(one.name, getattr(instance, one.name), one.metadata["kind"], error)
        object.__setattr__(instance, one.name, value)


def check(name: str, value: object, kind: Kind, error: type[Idefics2Error]) -> Any:
    """Return ``value`` converted by ``kind``; raise ``error`` about ``name`` if it does not fit."""
    try:
        return kind(value)
    except MismatchError as found:
        raise error(f"{name} must be {found.wanted}, got {found.got}") from None


def flag(value: object) -> bool:
    """Accept ``True`` and ``False``."""
    if not isinstance(value, bool):
        raise MismatchError("True or False", short_repr(value))
    return value


def text(value: object) -> str:
    """Accept a string."""
    if not isinstance(value, str):
        raise MismatchError("a string", short_repr(value))
    return value


def path(value: object) -> str | Path:
    """Accept the name of a file or folder: a string or a path of strings."""
    if isinstance(value, str):
        return value
    name = os.fspath(value) if isinstance(value, os.PathLike) else None
    if not isinstance(name, str):
        raise MismatchError("a string or a path", short_repr(value))
    return Path(name)


@dataclass(frozen=True)
class Whole:
    """A kind of integers from ``low`` to ``high``, of any library, without booleans and floats."""

    low: int
    high: float = math.inf

    def __call__(self, value: object) -> int:
        """Return the integer."""
        number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
        if number is None or not self.low <= number <= self.high:
            bounds = f"from {self.low} to {self.high}"
            if self.high == math.inf:
                bounds = f"of at least {self.low}"
            raise MismatchError(f"an integer {bounds}", short_repr(value))
        return number


@dataclass(frozen=True)
class Number:
    """A kind of real numbers in [``low``, ``high``], or in (``low``, ``high``] with ``above``."""

    low: float
    high: float
    above: bool = False

    def __call__(self, value: object) -> float:
        """Return the number as a float."""
        number = _float(value)
        if not self.low <= number <= self.high or (self.above and number == self.low):
            bracket = "(" if self.above else "["
            raise MismatchError(
                f"a number in {bracket}{self.low:g}, {self.high:g}]", short_repr(value)
            )
        return number


class OneOf:
    """A kind of the given strings."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __call__(self, value: object) -> str:
        """Return the string."""
        if not isinstance(value, str) or value not in self._names:
            quoted = [repr(str(name)) for name in self._names]
            several = f"one of {', '.join(quoted)}"
            raise MismatchError(
                several if len(quoted) > 2 else " or ".join(quoted), short_repr(value)
            )
        return value


@dataclass(frozen=True)
class OrNone:
    """A kind of ``None`` and the values of ``kind``."""

    kind: Kind

    def __call__(self, value: object) -> Any:
        """Return ``None``, or the value converted by the kind."""
        return None if value is None else self.kind(value)


@dataclass(frozen=True)
class ListOf:
    """A kind of lists and tuples of values of ``kind``.

    Attributes:
        kind: Kind of the elements.
        name: Name of the elements, in the plural.
        least: Least number of elements.
        or_one: Whether a string counts as a list of one; otherwise it is rejected.
    """

    kind: Kind
    name: str
    least: int = 0
    or_one: bool = False

    def __call__(self, values: object) -> tuple[Any, ...]:
        """Return the elements as a tuple."""
        if self.or_one and isinstance(values, str):
            values = [values]
        wanted = f"a list of {'one or more ' if self.least else ''}{self.name}"
        if not isinstance(values, (list, tuple)) or len(values) < self.least:
            raise MismatchError(wanted, short_repr(values))
        try:
            return tuple(map(self.kind, values))
        except MismatchError as found:
            got = f"{found.got} in {short_repr(values)}"
            raise MismatchError(f"{wanted}, each {found.wanted}", got) from None


def _float(value: object) -> float:
    """Convert a real number to a Python float; return NaN, which is in no range, for others."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
