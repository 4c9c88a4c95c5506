"""Batches of rows, bounded by rows and by what they hold in memory."""

from collections.abc import Iterable, Iterator
from typing import Any

from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow

_MOST_ROWS = 256
_MOST_SIZE = 1 << 22


def row_batches(rows: Iterable[IdentifiedRow]) -> Iterator[list[IdentifiedRow]]:
    """Yield ``rows`` in lists, lazily and in order.

    A batch has at most 256 rows. It ends with the row that brings its texts and images, which may
    be bytes, to 4 MiB.
    """
    batch: list[IdentifiedRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _size(row.raw.columns)
        if len(batch) == _MOST_ROWS or size >= _MOST_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Return the characters and bytes in the columns of a row."""
    kind = type(value)
    if kind is str or kind is bytes:
        return len(value)
    if kind is dict:
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if kind is list else 0
