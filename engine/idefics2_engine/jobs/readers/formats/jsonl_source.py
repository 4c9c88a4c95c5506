"""Rows of a JSONL file, line by line."""

from collections.abc import Iterator
from typing import BinaryIO

from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.files.named_files import local_files, shown_name
from idefics2_engine.jobs.readers.files.unpacked_files import open_unpacked
from idefics2_engine.jobs.readers.json_line import parse_line
from idefics2_engine.jobs.readers.source import UNREAD, RawRow

_BOM = b"\xef\xbb\xbf"
_SKIPPED_AT_ONCE = 1 << 16
# So many bad lines may precede the one that shows the form
_MOST_LOOKED_AT = 100


class JsonlSource:
    r"""Rows of one file whose lines end with ``\n``. Each line stands alone.

    Args:
        name: A file, also packed, or an address.
        form: ``plain`` or ``openai``. If ``None``, the keys of the first row show it.
        max_line_bytes: Longer lines are bad rows, and are not held in memory.
    """

    def __init__(self, name: str, form: str | None, max_line_bytes: int) -> None:
        self.files = local_files([name])
        self._name = name
        self._label = shown_name(name)
        self._most = max_line_bytes
        self.form = form or self._first_form()

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows from the first one; blank lines are none.

        Raises:
            JobError: The file cannot be read.
        """
        return self.rows_behind(0)

    def rows_behind(self, count: int) -> Iterator[RawRow]:
        """Yield ``UNREAD`` for each of the first ``count`` rows, then the other rows.

        Raises:
            JobError: The file cannot be read.
        """
        with open_unpacked(self._name) as file:
            for number, (line, size) in enumerate(_lines(file, self._most), 1):
                if count:
                    # A line that is too long is a row as well
                    if line is None or not _is_blank(line):
                        count -= 1
                        yield UNREAD
                    continue
                place = f"{self._label}: line {number}"
                try:
                    if line is None:
                        raise BadRowError(
                            "json", f"line must have at most {self._most} bytes, got {size}"
                        )
                    if not _is_blank(line):
                        yield RawRow(place, parse_line(line))
                except BadRowError as error:
                    yield RawRow(place, None, error.row_error)

    def _first_form(self) -> str:
        with open_unpacked(self._name) as file:
            for number, (line, _) in enumerate(_lines(file, self._most)):
                if number == _MOST_LOOKED_AT:
                    break
                if line is not None and not _is_blank(line):
                    try:
                        keys = parse_line(line).keys()
                    except BadRowError:
                        continue
                    is_openai = "body" in keys and bool(keys & {"custom_id", "url", "method"})
                    return "openai" if is_openai else "plain"
        return "plain"


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line and its number of bytes; ``None`` for a line of more than ``most``."""
    readline = file.readline
    line = readline(most + 1)
    if line.startswith(_BOM):
        # A line of the limit's length may now be complete
        line = line[len(_BOM) :]
        if not line.endswith(b"\n"):
            line += readline(most + 1 - len(line))
    while line:
        if len(line) <= most or line.endswith(b"\n"):
            yield line, len(line)
        else:
            size = len(line)
            # Not held while the rest is skipped
            line = b""
            yield None, size + _skip_line(file)
        line = readline(most + 1)


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line; return the number of bytes without the end."""
    size = 0
    while part := file.readline(_SKIPPED_AT_ONCE):
        size += len(part)
        if part.endswith(b"\n"):
            return size - 1
    return size
