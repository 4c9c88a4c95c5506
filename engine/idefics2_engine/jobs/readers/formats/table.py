"""Tables: Parquet and CSV files, of which a few rows at a time are in memory.

Both are read as plain Python data. A row that cannot be read is an error of that row. A file that
cannot be read is a ``JobError``, after the rows in front of the damage.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.readers.files.named_files import (
    Name,
    base_name,
    local_files,
    reading,
    shown_name,
)
from idefics2_engine.jobs.readers.files.opened_files import open_input
from idefics2_engine.jobs.readers.files.unpacked_files import open_unpacked
from idefics2_engine.jobs.readers.formats.arrow_values import read_rows
from idefics2_engine.jobs.readers.source import UNREAD, RawRow

# A batch of Parquet is decoded at once. More rows than this are hardly faster.
_MOST_ROWS = 64
_BATCH_BYTES = 16 << 20
# Without a buffer Parquet reads a whole row group, which may be gigabytes of images
_BUFFER_BYTES = 1 << 16
# Longest line and longest cell of CSV. A lost quote would otherwise make one cell of the file.
MOST_CHARACTERS = 1 << 26


class ParquetSource:
    """Rows of Parquet files.

    Memory is bounded by pages of the file and by a batch, which has few rows if they are large.

    Args:
        paths: The files, in order.
        options: Its ``columns_needed`` names the columns to read; None is all of them.

    Raises:
        ConfigError: pyarrow is not installed.
        JobError: On reading: a file is missing or damaged.
    """

    form = "columns"

    def __init__(self, paths: Sequence[Name], options: object) -> None:
        self._names = tuple(paths)
        self._needed = _columns_needed(options)
        self._parquet = import_extra("pyarrow.parquet", "parquet")
        self.files = local_files(paths)

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows of all files."""
        return self.rows_behind(0)

    def rows_behind(self, count: int) -> Iterator[RawRow]:
        """Yield ``UNREAD`` for rows of row groups of which no row is behind the first ``count``."""
        for name in self._names:
            for row in self._rows(name, count):
                count -= 1
                yield row

    def _rows(self, name: Name, unread: int) -> Iterator[RawRow]:
        number = 0
        with open_input(name) as raw:
            with reading(name):
                file = self._parquet.ParquetFile(
                    raw,
                    pre_buffer=False,
                    buffer_size=_BUFFER_BYTES,
                    page_checksum_verification=True,
                )
                there = file.schema_arrow.names
            _check_names(there, name)
            columns = there if self._needed is None else [n for n in self._needed if n in there]
            for group in range(file.metadata.num_row_groups):
                description = file.metadata.row_group(group)
                end = number + description.num_rows
                if number < end <= unread:
                    yield from repeat(UNREAD, description.num_rows)
                    number = end
                    continue
                batches = file.iter_batches(
                    batch_size=rows_a_batch(description),
                    row_groups=[group],
                    columns=columns,
                    use_threads=False,
                )
                while True:
                    with reading(name, f"at row {number}"):
                        batch = next(batches, None)
                        if batch is None:
                            break
                        rows = list(read_rows(batch, columns))
                    for values, error in rows:
                        yield RawRow(f"{base_name(name)}: row {number}", values, error)
                        number += 1
                # Another iterator may have counted them by the description
                if number != end:
                    raise JobError(
                        f"{shown_name(name)}: must have {end} rows up to row group {group}, "
                        f"got {number}"
                    )
            if number != file.metadata.num_rows:
                raise JobError(
                    f"{shown_name(name)}: must have {file.metadata.num_rows} rows, got {number}"
                )


class CsvSource:
    """Rows of CSV files in UTF-8, whose first line names the columns; all values are text.

    An empty cell is None. Files may be packed (``.gz``, ``.zst``).

    Args:
        paths: The files, in order.
        options: Its ``columns_needed`` names the columns to return; None is all of them.

    Raises:
        JobError: On reading: a file is missing or has no line of column names.
    """

    form = "columns"

    def __init__(self, paths: Sequence[Name], options: object) -> None:
        self._names = tuple(paths)
        self._needed = _columns_needed(options)
        self.files = local_files(paths)

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows of all files."""
        for name in self._names:
            yield from self._rows(name)

    def rows_behind(self, count: int) -> Iterator[RawRow]:
        """Yield all rows. Most of the cost is finding where they begin."""
        return iter(self)

    def _rows(self, name: Name) -> Iterator[RawRow]:
        # The limit is the process's, and another user's may be higher
        csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
        with open_unpacked(name) as raw:
            # Bytes that are not UTF-8 become surrogates, so that they are an error of their row
            text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="")
            lines = _Lines(text)
            records = csv.reader(lines, strict=True)
            header = None
            while True:
                line = records.line_num + 1
                lines.was_cut = False
                cells: list[str] | None
                error: RowError | None = None
                with reading(name, f"at line {line}"):
                    try:
                        cells = next(records, None)
                    except csv.Error:
                        cells, error = [], _NO_RECORD
                if cells is None:
                    break
                if lines.was_cut:
                    error = _TOO_LONG
                if not cells and error is None:
                    continue
                if header is None:
                    header = _header(cells, error, name)
                    continue
                error = error or _cells_error(cells, len(header))
                place = f"{base_name(name)}: line {line}"
                if error is not None:
                    yield RawRow(place, None, error)
                    continue
                row = {column: cell or None for column, cell in zip(header, cells, strict=True)}
                if self._needed is not None:
                    row = {column: row[column] for column in self._needed if column in row}
                yield RawRow(place, row)
            if header is None:
                raise JobError(f"{shown_name(name)}: must begin with the names of columns")


_NO_RECORD = RowError(
    "schema", "parse", "must be comma-separated values, got a quote that is out of place or open"
)
_TOO_LONG = RowError(
    "schema", "parse", f"a line must have at most {MOST_CHARACTERS} characters, got more"
)


class _Lines:
    """Lines of text. The cells of a line that is too long are dropped.

    Attributes:
        was_cut: Whether a line since the last reset was too long.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.was_cut = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(MOST_CHARACTERS)
        if not line:
            raise StopIteration
        if not _is_cut(line):
            return line
        self.was_cut = True
        quotes = line.count('"')
        while _is_cut(line):
            line = self._text.readline(MOST_CHARACTERS)
            quotes += line.count('"')
        # The cells are dropped. Whether a quote is open behind the line is not.
        return '"\n' if quotes % 2 else "\n"


def _is_cut(line: str) -> bool:
    return len(line) == MOST_CHARACTERS and line[-1] not in "\r\n"


def _columns_needed(options: object) -> tuple[str, ...] | None:
    names = getattr(options, "columns_needed", None)
    return None if names is None else tuple(names)


def _check_names(names: Sequence[str], name: Name) -> None:
    """Raise ``JobError`` if a column's name is there twice."""
    seen: set[str] = set()
    for column in names:
        if column in seen:
            raise JobError(
                f"{shown_name(name)}: columns must have different names, got {short_repr(column)} "
                "twice"
            )
        seen.add(column)


def rows_a_batch(group: Any) -> int:
    """Return how many rows of a row group are decoded at once.

    Bytes of columns that nobody needs count as well: pyarrow ends the process if the description of
    a column is damaged.
    """
    bytes_a_row: int = group.total_byte_size // max(group.num_rows, 1)
    return min(max(_BATCH_BYTES // max(bytes_a_row, 1), 1), _MOST_ROWS)


def _header(cells: list[str], error: RowError | None, name: Name) -> list[str]:
    if error is not None or _cells_error(cells, len(cells)) is not None:
        raise JobError(f"{shown_name(name)}: the first line must name the columns in UTF-8")
    _check_names(cells, name)
    return cells


def _cells_error(cells: list[str], num_columns: int) -> RowError | None:
    """Return what is wrong with the cells of a line."""
    if len(cells) != num_columns:
        return RowError(
            "schema", "parse", f"must have {num_columns} cells as the first line, got {len(cells)}"
        )
    if not all(map(str.isascii, cells)):
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            return RowError("encoding", "parse", "must be UTF-8, got other bytes")
    return None
