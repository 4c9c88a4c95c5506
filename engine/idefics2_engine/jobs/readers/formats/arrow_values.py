"""Values of Arrow arrays as Python data, row by row."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.job_row import RowError

# Levels of lists and structs. A conversation with images has four.
_MOST_LEVELS = 32


class UnreadableValue:
    """Stands for a value that Python cannot hold, such as a date after the year 9999.

    A row with such a value is an error only if it uses the value.
    """


class _NotUtf8:
    """Stands for a text that cannot be decoded."""


def read_rows(
    batch: Any, columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any] | None, RowError | None]]:
    """Yield the values of each row of a ``pyarrow.RecordBatch``, or the row's error.

    Args:
        batch: The rows.
        columns: Names of columns.
    """
    values = [_values(batch.column(name)) for name in columns]
    for index in range(batch.num_rows):
        row = {name: column[index] for name, column in zip(columns, values, strict=True)}
        bad = next((name for name, value in row.items() if isinstance(value, _NotUtf8)), None)
        if bad is None:
            yield row, None
        else:
            message = f"column {short_repr(bad)} must be UTF-8, got other bytes"
            yield None, RowError("encoding", "parse", message)


def _values(array: Any) -> Sequence[Any]:
    """Return the values of an array, with a stand-in for each that cannot be converted."""
    import pyarrow as pa

    # Extension types depend on what was imported. What they store does not.
    while isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if not _levels_fit(kind, _MOST_LEVELS):
        return [UnreadableValue()] * len(array)
    # Nanoseconds depend on whether pandas is installed
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        kind = pa.timestamp("us", kind.tz)
    elif pa.types.is_duration(kind) and kind.unit == "ns":
        kind = pa.duration("us")
    try:
        return cast(list[Any], array.cast(kind).to_pylist())
    except (ValueError, OverflowError):
        return [_value(one, kind) for one in array]


def _value(scalar: Any, kind: Any) -> Any:
    try:
        return scalar.cast(kind).as_py()
    except UnicodeDecodeError:
        return _NotUtf8()
    except (ValueError, OverflowError):
        return UnreadableValue()


def _levels_fit(kind: Any, levels: int) -> bool:
    """Return whether an Arrow type has at most so many levels of nesting."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _levels_fit(kind.value_type, levels)
    fields = (kind.field(index) for index in range(kind.num_fields))
    return levels >= 0 and all(_levels_fit(field.type, levels - 1) for field in fields)
