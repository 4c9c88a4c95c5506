"""What EXIF and the directories of a TIFF file hold in tags, counted without making values of them.

Both have one form. EXIF is a TIFF file without pixels.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from idefics2_engine.errors import ImageError

_MAX_TAGS = 1024  # of all directories that Pillow reads
_MAX_VALUES = 1 << 18
_RATIONAL_VALUES = 16  # what one counts as: it becomes an object of its own
_MAX_TAG_BYTES = 16 << 20

_DIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS and, in EXIF, Interop
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_BYTES, _RATIONALS = (1, 2, 7), (5, 10)  # types; those are one value however long
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8"}


@dataclass(frozen=True)
class Tag:
    """An entry of a directory whose values lie within the file."""

    number: int
    type: int
    count: int
    at: int  # where the values begin

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.count * _SIZES[self.type]


@dataclass(frozen=True)
class Tiff:
    """A file and how its numbers are written."""

    data: bytes
    name: str  # in messages

    @property
    def order(self) -> str:
        """Byte order as struct and numpy write it."""
        return "<" if self.data[:2] == b"II" else ">"

    @property
    def is_big(self) -> bool:
        """Whether it is a BigTIFF, as Pillow decides it."""
        return self.data[2] == 43

    @property
    def first(self) -> int:
        """Where the first directory lies."""
        return self.number(8, 8) if self.is_big else self.number(4, 4)

    def number(self, at: int, size: int) -> int:
        """Return the number in ``size`` bytes, or in what the file has of them."""
        little = self.order == "<"
        return int.from_bytes(self.data[at : at + size], "little" if little else "big")

    def tags(self, at: int) -> list[Tag]:
        """Return those entries of the directory at ``at`` that Pillow would read.

        Raises:
            ImageError: It has too many.
        """
        head, entry, inline = (8, 20, 8) if self.is_big else (2, 12, 4)
        start = at + head
        count = min(self.number(at, head), max(0, len(self.data) - start) // entry)
        _check_count(count, self.name)
        layout = struct.Struct(self.order + ("HHQ" if self.is_big else "HHL"))
        tags = []
        for place in range(start, start + count * entry, entry):
            number, kind, length = layout.unpack_from(self.data, place)
            size = length * _SIZES.get(kind, 0)
            value = place + entry - inline
            if size > inline:
                value = self.number(value, inline)
            if size and value + size <= len(self.data):
                tags.append(Tag(number, kind, length, value))
        return tags

    def values(self, tag: Tag) -> npt.NDArray[np.int64]:
        """Return a tag's integers; none where it has others."""
        kind = _INTEGERS.get(tag.type)
        if kind is None:
            return np.zeros(0, np.int64)
        found = np.frombuffer(self.data, self.order + kind, tag.count, tag.at)
        return found.astype(np.int64)


def check_exif(data: bytes, name: str) -> None:
    """Hold EXIF, which may begin with its name, to the bounds on tags.

    Raises:
        ImageError: It has too many. What is damaged is left to Pillow.
    """
    for _ in range(2):  # as Pillow does
        data = data.removeprefix(b"Exif\0\0")
    if len(data) >= 8:
        tiff = Tiff(data, name)
        check_tags(tiff, tiff.tags(tiff.first), 0)


def check_tags(tiff: Tiff, tags: list[Tag], more_bytes: int) -> None:
    """Hold a directory's tags, with those of the directories that it leads to, to the bounds.

    Args:
        tiff: The file.
        tags: The tags; they may have ``more_bytes`` than others.
        more_bytes: See there.

    Raises:
        ImageError: They are too many, or have too many values or bytes.
    """
    every = list(tags)
    waiting = [tag for tag in tags if tag.number in _DIRECTORIES]
    while waiting:
        for at in tiff.values(waiting.pop())[:1]:
            more = tiff.tags(max(0, int(at)))
            every += more
            _check_count(len(every), tiff.name)  # which also ends a circle
            waiting += [tag for tag in more if tag.number in _DIRECTORIES]
    number = sum(
        tag.count * (_RATIONAL_VALUES if tag.type in _RATIONALS else 1)
        for tag in every
        if tag.type not in _BYTES
    )
    if number > _MAX_VALUES:
        raise ImageError(
            f"{tiff.name}: must have at most {_MAX_VALUES} values in tags (a rational counts as "
            f"{_RATIONAL_VALUES}), got {number}"
        )
    most, size = _MAX_TAG_BYTES + more_bytes, sum(tag.size for tag in every)
    if size > most:
        raise ImageError(
            f"{tiff.name}: must have at most {most} bytes in tags at its size, got {size}"
        )


def _check_count(count: int, name: str) -> None:
    if count > _MAX_TAGS:
        raise ImageError(f"{name}: must have at most {_MAX_TAGS} tags, got {count} or more")
