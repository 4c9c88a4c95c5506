"""Identifiers of all rows of a job: which of them repeat, and other ones in their place.

Each row costs 8 bytes, a hash of its identifier. Rows with equal hashes are read again, so that
only equal identifiers count as repeated.
"""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from idefics2_engine.jobs.store.canonical_json import canonical_json

# Of more repeated hashes only the first ones are looked into
_MOST_LOOKED_INTO = 1000

RowId = str | int


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
    """Hashes of identifiers.

    Args:
        ids: The identifiers of all rows.
    """

    def __init__(self, ids: Iterable[RowId]) -> None:
        hashes = array("Q", map(_hash, ids))
        self._sorted: npt.NDArray[Any] = np.sort(np.frombuffer(hashes, np.uint64))

    def repeated(self) -> npt.NDArray[Any]:
        """Return the hashes of several rows, sorted, each as often as it is there less one."""
        return self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]

    def __contains__(self, row_id: RowId) -> bool:
        """Return whether a row may have the identifier; wrong with a chance of rows / 2**64."""
        value = np.uint64(_hash(row_id))
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and bool(self._sorted[place] == value)


class RepeatedIds(NamedTuple):
    """Rows whose identifier an earlier row has.

    Attributes:
        count: Number of these rows.
        first: The first ones.
    """

    count: int
    first: tuple[RepeatedId, ...]


def find_repeated(hashes: IdHashes, rows: Iterable[PlacedId], most: int) -> RepeatedIds:
    """Return the repeated identifiers.

    Args:
        hashes: Those of all rows.
        rows: All rows. They are read only if hashes repeat.
        most: Number of repeated identifiers to return.
    """
    repeated = hashes.repeated()
    if not len(repeated):
        return RepeatedIds(0, ())
    looked_into = {int(one) for one in repeated[:_MOST_LOOKED_INTO]}
    places: dict[RowId, str] = {}
    found, num_found, num_rows = [], 0, 0
    for row in rows:
        if _hash(row.id) in looked_into:
            num_rows += 1
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
        self._repeated = frozenset(map(int, hashes.repeated()))
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
    return int.from_bytes(blake2b(canonical_json(row_id), digest_size=8).digest(), "little")
