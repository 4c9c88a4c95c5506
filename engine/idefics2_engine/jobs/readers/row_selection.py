"""The part of an input's rows that a job has: a sample, and a limit."""

import heapq
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from idefics2_engine.jobs.readers.source import RawRow


class NumberedRow(NamedTuple):
    """A row with its place in the input, from 0, and the form of its source."""

    number: int
    raw: RawRow
    form: str


def sampled_numbers(num_rows: int, size: int, seed: int) -> "array[int]":
    """Return ``size`` of the numbers below ``num_rows``, sorted, all choices being as likely.

    Each number has a random value, which depends on it and the seed alone. Those with the lowest
    are chosen, so memory is needed for these only.
    """
    key = seed.to_bytes(8, "little", signed=True)

    def value(number: int) -> bytes:
        return blake2b(number.to_bytes(8, "little"), key=key, digest_size=8).digest()

    return array("Q", sorted(heapq.nsmallest(size, range(num_rows), key=value)))


def select(
    rows: Iterable[NumberedRow], numbers: "array[int] | None", limit: int | None
) -> Iterator[NumberedRow]:
    """Yield the rows of these numbers, at most ``limit``; no further row is read."""
    chosen = rows if numbers is None else _with_numbers(rows, numbers)
    return islice(chosen, limit)


def _with_numbers(rows: Iterable[NumberedRow], numbers: "array[int]") -> Iterator[NumberedRow]:
    wanted = iter(numbers)
    number = next(wanted, None)
    for row in rows:
        if number is None:
            return
        if row.number == number:
            yield row
            number = next(wanted, None)
