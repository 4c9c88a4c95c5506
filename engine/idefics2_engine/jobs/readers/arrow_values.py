"""Values of Arrow arrays as plain Python data, one row at a time."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.job_row import RowError

# Levels of lists and structs. A list of images, which are structs, has two.
_MOST_LEVELS = 16


class _NotUtf8:
    """Stands for a text that cannot be decoded."""


def plain_rows(
    batch: Any, columns: Sequence[str], *, drop_others: bool
) -> Iterator[tuple[dict[str, Any] | None, RowError | None]]:
    """Yield the values of each row of a record batch, or the row's error.

    Plain values are None, text, bytes, numbers, truth values, and lists and structs of these.

    Args:
        batch: A ``pyarrow.RecordBatch``.
        columns: Names of columns.
        drop_others: Whether columns with other types are left out. If not, they are an error of
            every row.
    """
    names, values = [], []
    for name in columns:
        array = batch.column(name)
        # Extension types depend on what was imported. What they store does not.
        while hasattr(array, "storage"):
            array = array.storage
        if _is_plain(array.type, _MOST_LEVELS):
            names.append(name)
            values.append(_values(array))
        elif not drop_others:
            message = (
                f"column {short_repr(name)}: must have text, numbers, truth values, bytes, or lists "
                f"or structs of these, got {_kind_name(array.type)}"
            )
            yield from [(None, RowError("schema", "parse", message))] * batch.num_rows
            return
    for index in range(batch.num_rows):
        row = {name: column[index] for name, column in zip(names, values, strict=True)}
        bad = next((name for name, value in row.items() if isinstance(value, _NotUtf8)), None)
        if bad is None:
            yield row, None
        else:
            message = f"column {short_repr(bad)}: must be UTF-8, got other bytes"
            yield None, RowError("encoding", "parse", message)


def _values(array: Any) -> Sequence[Any]:
    """Return the values of an array, with ``_NotUtf8`` for those that cannot be decoded."""
    try:
        return cast(list[Any], array.to_pylist())
    except UnicodeDecodeError:
        return [_value(one) for one in array]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NotUtf8()


def _is_plain(kind: Any, levels: int) -> bool:
    """Return whether values of an Arrow type are plain data within ``levels`` of nesting."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type, levels)
    if any(test(kind) for test in _lists(types)):
        return levels > 0 and _is_plain(kind.value_type, levels - 1)
    if types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        different = len({field.name for field in fields}) == len(fields)
        return (
            levels > 0 and different and all(_is_plain(field.type, levels - 1) for field in fields)
        )
    return any(test(kind) for test in _scalars(types))


def _lists(types: Any) -> Sequence[Any]:
    return (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )


def _scalars(types: Any) -> Sequence[Any]:
    return (
        types.is_null,
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )


def _kind_name(kind: Any) -> str:
    """Return the name of a type for a message."""
    # The name of a nested type has no bound
    return "values that are nested in another way" if kind.num_fields else str(kind)
