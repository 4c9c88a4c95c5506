"""Identifiers of all rows of a job: which of them repeat, and other ones in their place.

Each row costs 8 bytes, a hash of its identifier. Rows with equal hashes are read again, so that
only equal identifiers count as repeated.
"""

from array import array
from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Of more repeated hashes only the first ones are looked into
_MOST_LOOKED_INTO = 1000

RowId = str | int
Hashes = npt.NDArray[np.uint64]


class RepeatedId(NamedTuple):
    """An identifier of two rows, and where they are."""

    id: RowId
    first: str
    second: str


class PlacedId(NamedTuple):
    """An identifier of a row, and where the row is."""

    id: RowId
    place: str


class IdHashes:
    """Hashes of the identifiers of all rows, which are added in their order."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, row_id: RowId) -> None:
        """Add the identifier of the next row. All are added before the other methods are used."""
        self._hashes.append(_hash(row_id))

    @cached_property
    def repeated(self) -> Hashes:
        """Hashes of the rows whose hash an earlier row has, in the order of the rows."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        later: Hashes = hashes[np.sort(order[1:][ordered[1:] == ordered[:-1]])]
        return later

    @cached_property
    def _sorted(self) -> Hashes:
        return np.sort(np.frombuffer(self._hashes, np.uint64))

    def __contains__(self, row_id: RowId) -> bool:
        """Return whether a row may have the identifier; wrong with a chance of rows / 2**64."""
        value = np.uint64(_hash(row_id))
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and bool(self._sorted[place] == value)


class RepeatedIds(NamedTuple):
    """Rows whose identifier an earlier row has.

    Attributes:
        num_rows: Number of these rows.
        first: The first ones.
    """

    num_rows: int
    first: tuple[RepeatedId, ...]


def find_repeated(hashes: IdHashes, rows: Iterable[PlacedId], most: int) -> RepeatedIds:
    """Return the repeated identifiers.

    Args:
        hashes: Those of all rows.
        rows: All rows. They are read only if hashes repeat.
        most: Number of repeated identifiers to return.
    """
    repeated = hashes.repeated
    if not len(repeated):
        return RepeatedIds(0, ())
    looked_into = {int(one) for one in repeated[:_MOST_LOOKED_INTO]}
    places: dict[RowId, str] = {}
    found: list[RepeatedId] = []
    num_found = 0
    for row in rows:
        if _hash(row.id) in looked_into:
            if row.id in places:
                num_found += 1
                if len(found) < most:
                    found.append(RepeatedId(row.id, places[row.id], row.place))
            else:
                places[row.id] = row.place
    # Further ones are not looked into, and are counted by their hashes
    others = int(np.count_nonzero(~np.isin(repeated, np.fromiter(looked_into, np.uint64))))
    return RepeatedIds(num_found + others, tuple(found))


class IdSuffixes:
    """Replaces repeated identifiers by ``id-2``, ``id-3`` and so on, in the order of the rows.

    An identifier that is there once is never replaced, and nothing gets one that is there.

    Args:
        hashes: Those of all rows.
    """

    def __init__(self, hashes: IdHashes) -> None:
        self._hashes = hashes
        self._repeated = frozenset(map(int, hashes.repeated))
        self._used: dict[RowId, int] = {}
        self._made: set[str] = set()

    def unique(self, row_id: RowId) -> RowId:
        """Return the identifier of the next row."""
        if _hash(row_id) not in self._repeated:
            return row_id
        number = self._used.get(row_id, 0) + 1
        if number == 1:
            self._used[row_id] = 1
            return row_id
        while (name := f"{row_id}-{number}") in self._hashes or name in self._made:
            number += 1
        self._used[row_id] = number
        self._made.add(name)
        return name


def _hash(row_id: RowId) -> int:
    # 1 and "1" differ
    text = row_id if isinstance(row_id, str) else f"{row_id}\0"
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
