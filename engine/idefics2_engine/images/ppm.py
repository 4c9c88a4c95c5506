"""Conversion of PPM files that Pillow would decode in Python to files that it decodes in C."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.ImageFile import ImageFile

from idefics2_engine.errors import ImageError

# Reading so many numbers in digits takes about a second
_MAX_NUMBERS = 1 << 22
# Pillow has the same bound for the digits of a number
_MAX_DIGITS = 10
# Bytes of text, and numbers, that are converted at a time. Other threads wait while text is
# converted.
_TEXT, _SAMPLES = 1 << 16, 1 << 20
_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")
_SPACE = b" \t\n\r\v\f"
_BREAK = re.compile(rb"[ \t\n\r\v\f]")


def in_binary(image: ImageFile, data: bytes, name: str) -> bytes:
    """Return a PPM file of the same image that Pillow decodes in C.

    Its samples have 8 bits, or 16 if Pillow reads the image in mode I. A file that Pillow decodes
    in C anyway is returned unchanged.

    Args:
        image: The opened file, whose size has been checked.
        data: Bytes of the file.
        name: Name of the file in error messages.

    Raises:
        ImageError: The file has too many numbers in digits.
        ValueError: The file is damaged.
    """
    decoder, _, start, args = image.tile[0]
    if decoder == "raw":
        return data
    count = image.width * image.height * len(image.getbands())
    wide = image.mode == "I"
    if image.mode == "1":
        # In a bitmap 1 is black
        table = np.array([255, 0], np.uint8)
        parts = _bits(_without_comments(data, start))
    else:
        most: Any = args[-1]  # type: ignore[index]
        reach = 65535 if wide else 255
        # The rounding is Pillow's, as is the clipping of binary samples that are too large
        scaled = [
            min(reach, round(value / most * reach)) for value in range(256 if most < 256 else 65536)
        ]
        table = np.array(scaled, ">u2" if wide else np.uint8)
        if decoder == "ppm":
            parts = _numbers(np.frombuffer(data, np.uint8 if most < 256 else ">u2", count, start))
        elif count > _MAX_NUMBERS:
            raise ImageError(
                f"{name}: must have at most {_MAX_NUMBERS} numbers in digits, got {count}"
            )
        else:
            parts = _digits(_without_comments(data, start), count, most)
    samples = np.empty(count, table.dtype)
    done = 0
    for part in parts:
        part = part[: count - done]
        samples[done : done + len(part)] = table[part]
        done += len(part)
        if done == count:
            break
    if done < count:
        raise ValueError(f"{done} of {count} numbers")
    kind = b"P6" if len(image.getbands()) == 3 else b"P5"
    head = b"%s %d %d %d\n" % (kind, image.width, image.height, 65535 if wide else 255)
    return b"".join((head, samples.data))


def _without_comments(data: bytes, start: int) -> bytes:
    return _COMMENT.sub(b"", data[start:])


def _numbers(samples: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    # numpy converts indices to eight bytes each, so the table is applied to a part at a time
    for start in range(0, len(samples), _SAMPLES):
        yield samples[start : start + _SAMPLES]


def _bits(text: bytes) -> Iterator[npt.NDArray[Any]]:
    """Yield the digits 0 and 1 of ``text`` as numbers, ignoring white space.

    Raises:
        ValueError: There is another character.
    """
    for start in range(0, len(text), _SAMPLES):
        digits = text[start : start + _SAMPLES].translate(None, _SPACE)
        if digits.translate(None, b"01"):
            raise ValueError("another digit")
        yield np.frombuffer(digits, np.uint8) - ord("0")


def _digits(text: bytes, count: int, most: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the first ``count`` numbers of ``text``, which white space separates.

    Raises:
        ValueError: A number has too many digits, is not a whole number, or is not in [0, most].
    """
    start = 0
    while start < len(text) and count:
        space = _BREAK.search(text, start + _TEXT)
        end = space.start() if space else len(text)
        words = text[start:end].split()[:count]
        if max(map(len, words), default=0) > _MAX_DIGITS:
            raise ValueError("a long number")
        numbers = np.fromiter(map(int, words), np.int64, len(words))
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= most:
            raise ValueError("a number out of range")
        yield numbers
        start, count = end, count - len(numbers)
