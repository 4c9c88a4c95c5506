"""Bounds on the tags of EXIF and TIFF files, checked without converting their values.

EXIF has the form of a TIFF file without pixels.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from idefics2_engine.errors import ImageError

# Bound on the tags of all directories that Pillow reads
_MAX_TAGS = 1024
_MAX_VALUES = 1 << 18
# A rational counts as so many values, because Pillow makes an object of each
_RATIONAL_VALUES = 16
_MAX_TAG_BYTES = 16 << 20

# These tags point to the directories of EXIF, GPS and, within EXIF, Interop
_DIRECTORIES = (34665, 34853, 40965)
# Bytes of a value of each type
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# A tag of a type in _BYTES is one value of any length
_BYTES, _RATIONALS = (1, 2, 7), (5, 10)
# numpy's names of the integer types
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8"}


@dataclass(frozen=True)
class Tag:
    """An entry of a directory whose values are within the file."""

    number: int
    type: int
    count: int
    # Offset of the values in the file, in bytes
    at: int

    @property
    def size(self) -> int:
        """Size of the values in bytes."""
        return self.count * _SIZES[self.type]


@dataclass(frozen=True)
class Tiff:
    """A TIFF file, or EXIF, as a source of numbers and tags."""

    data: bytes
    # Name of the file in error messages
    name: str

    @property
    def order(self) -> str:
        """Byte order in the notation of struct and numpy, ``<`` or ``>``."""
        return "<" if self.data[:2] == b"II" else ">"

    @property
    def is_big(self) -> bool:
        """Whether Pillow reads the file as a BigTIFF."""
        return self.data[2] == 43

    @property
    def first(self) -> int:
        """Offset of the first directory in bytes."""
        return self.number(8, 8) if self.is_big else self.number(4, 4)

    def number(self, at: int, size: int) -> int:
        """Return the unsigned integer in the ``size`` bytes at offset ``at``.

        At the end of the file the integer has fewer bytes.
        """
        little = self.order == "<"
        return int.from_bytes(self.data[at : at + size], "little" if little else "big")

    def tags(self, at: int) -> list[Tag]:
        """Return the entries that Pillow reads of the directory at offset ``at``.

        Entries of an unknown type, without values, or with values beyond the file are skipped.

        Raises:
            ImageError: The directory has too many entries.
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
        """Return a tag's integers, (count,), or an empty array if its type is not an integer."""
        kind = _INTEGERS.get(tag.type)
        if kind is None:
            return np.zeros(0, np.int64)
        found = np.frombuffer(self.data, self.order + kind, tag.count, tag.at)
        return found.astype(np.int64)


def check_exif(data: bytes, name: str) -> None:
    """Check the tags of EXIF against their bounds.

    Args:
        data: EXIF, with or without its prefix.
        name: Name of the file in error messages.

    Raises:
        ImageError: A bound is exceeded. Damage is left to Pillow.
    """
    # Pillow removes up to two prefixes
    for _ in range(2):
        data = data.removeprefix(b"Exif\0\0")
    if len(data) >= 8:
        tiff = Tiff(data, name)
        check_tags(tiff, tiff.tags(tiff.first), 0)


def check_tags(tiff: Tiff, tags: list[Tag], more_bytes: int) -> None:
    """Check the tags of a directory, and of the directories that it points to, against the bounds.

    Args:
        tiff: The file.
        tags: Tags of the directory.
        more_bytes: Bytes that are added to the bound on the size of all values.

    Raises:
        ImageError: There are too many tags, or their values are too many or too large.
    """
    every = list(tags)
    waiting = [tag for tag in tags if tag.number in _DIRECTORIES]
    while waiting:
        for at in tiff.values(waiting.pop())[:1]:
            more = tiff.tags(max(0, int(at)))
            every += more
            # The check also ends a circle of directories
            _check_count(len(every), tiff.name)
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
