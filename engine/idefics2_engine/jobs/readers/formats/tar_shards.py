"""Tar shards as WebDataset writes them: members whose names differ in the extension are a row."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from idefics2_engine.errors import short_repr
from idefics2_engine.images.loader import MAX_BYTES
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.files.named_files import (
    Name,
    base_name,
    local_files,
    printable,
)
from idefics2_engine.jobs.readers.files.unpacked_files import open_unpacked
from idefics2_engine.jobs.readers.formats.image_folder import IMAGE_SUFFIXES
from idefics2_engine.jobs.readers.formats.tar_archive import Member, read_members
from idefics2_engine.jobs.readers.json_line import parse_line
from idefics2_engine.jobs.readers.source import RawRow

# WebDataset's own pattern: the key ends at the first dot of the last part
_NAME = re.compile(r"(?:\./)*((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
MOST_MEMBERS = 1000


class TarShardSource:
    """Rows of tar shards, which are read as streams and may be packed.

    Neighboring members with the same name up to the first dot of the last part are one row. Its
    identifier is the name of the shard's file, a slash, and that name.

    - Images, known by their extensions, are the column ``images``, in the order of their names.
    - ``.txt`` is the column ``prompt``, and the keys of ``.json`` are columns.
    - Any other member is a column named after its extension: text if it is UTF-8, else bytes.

    Names without a dot, and with nothing before it, are no rows.

    Args:
        paths: The shards, in order.
        options: The members of a row must have at most its ``max_media_bytes``.

    Raises:
        JobError: On reading: a shard is missing or damaged. Rows before the damage are yielded,
            except the last one, which may lack members.
    """

    form = "columns"

    def __init__(self, paths: Sequence[Name], options: object) -> None:
        self._names = tuple(paths)
        self._takes_image = getattr(options, "image_column", None) is None
        self._most_bytes: int = getattr(options, "max_media_bytes", MAX_BYTES)
        self.files = local_files(paths)

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows of all shards."""
        for name in self._names:
            with open_unpacked(name) as file:
                members = (
                    (found[1], found[2], member)
                    for member in read_members(file, name)
                    if (found := _NAME.fullmatch(member.name))
                )
                for key, group in groupby(members, key=lambda one: one[0]):
                    row = _Row(self._most_bytes, self._takes_image)
                    for _, extension, member in group:
                        row.add(extension.lower(), member)
                    yield row.finish(f"{base_name(name)}/{key}")


class _Row:
    """A row of which the members are read one after another.

    Args:
        most_bytes: Bytes of all members together.
        takes_image: Whether a column ``image`` has images.
    """

    def __init__(self, most_bytes: int, takes_image: bool) -> None:
        self._left = most_bytes
        self._most = most_bytes
        self._takes_image = takes_image
        self._num_members = 0
        self._images: dict[str, bytes] = {}
        self._columns: dict[str, Any] = {}
        self._error: BadRowError | None = None

    def add(self, extension: str, member: Member) -> None:
        """Read a member. Nothing more is read after an error."""
        if self._error is not None:
            return
        try:
            self._add(extension, member)
        except BadRowError as error:
            self._error = error
            self._images, self._columns = {}, {}

    def finish(self, name: str) -> RawRow:
        """Return the row."""
        columns = self._columns
        names = {"images", "image"} if self._takes_image else {"images"}
        if self._images and (both := sorted(names & columns.keys())):
            self._error = BadRowError(
                "duplicate_key",
                f"images must be in members or in {both[0]!r}, got both",
            )
        if self._error is not None:
            return RawRow(printable(name), None, self._error.row_error, name)
        if self._images:
            columns = {**columns, "images": [self._images[one] for one in sorted(self._images)]}
        return RawRow(printable(name), columns, None, name)

    def _add(self, extension: str, member: Member) -> None:
        shown = f"member {short_repr('.' + extension)}"
        is_image = f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES
        if not member.is_file:
            code = "media_not_allowed" if is_image else "schema"
            raise BadRowError(code, f"{shown} must be a file, got a link, a pipe or a device")
        self._num_members += 1
        if self._num_members > MOST_MEMBERS:
            raise BadRowError("schema", f"the row must have at most {MOST_MEMBERS} members")
        self._left -= member.size
        if self._left < 0:
            raise BadRowError(
                "image" if is_image else "schema",
                f"the row must have at most {self._most} bytes, "
                f"got {self._most - self._left} with {shown}",
            )
        content = member.read()
        if is_image:
            _add_once(self._images, extension, content)
        elif extension == "json":
            for key, value in parse_line(content).items():
                _add_once(self._columns, key, value)
        elif extension == "txt":
            try:
                _add_once(self._columns, "prompt", content.decode())
            except UnicodeDecodeError:
                raise BadRowError("encoding", f"{shown} must be UTF-8, got other bytes") from None
        else:
            try:
                _add_once(self._columns, extension, content.decode())
            except UnicodeDecodeError:
                _add_once(self._columns, extension, content)


def _add_once(values: dict[str, Any], name: str, value: Any) -> None:
    if name in values:
        raise BadRowError(
            "duplicate_key", f"the row must have {short_repr(name)} once, got it again"
        )
    values[name] = value
