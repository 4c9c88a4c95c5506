"""Reduction of image sources to a few forms: text, a path, bytes, or pixels."""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from idefics2_engine.caller_errors import caller_code
from idefics2_engine.errors import ImageError, MediaNotAllowedError, short_repr
from idefics2_engine.images.arrays import is_tensor
from idefics2_engine.images.parallel import alone_with

# Bytes that are read from an open file at a time
_READ_AT_ONCE = 1 << 20
_WHITE_SPACE = " \t\r\n\f\v"
_TO_PLAIN_BASE64 = str.maketrans("-_", "+/", _WHITE_SPACE)


def plain_source(source: Any, max_bytes: int) -> Any:
    """Return ``source`` as a str, ``Path``, bytes, Pillow image, array or tensor.

    Other forms are converted here, because their contents may change after the call.

    Args:
        source: One of these types, an ``os.PathLike``, a bytearray or memoryview, an open binary
            file, or a mapping with ``"bytes"`` or ``"path"``. The bytes of a mapping take
            precedence over its path.
        max_bytes: Most bytes that are copied from a buffer or read from a file.

    Raises:
        ImageError: ``source`` has another type, is too large, or cannot be read.
    """
    with caller_code("image", ImageError):
        if isinstance(source, str | bytes | Path | Image.Image | np.ndarray) or is_tensor(source):
            return source
        if isinstance(source, os.PathLike):
            return Path(os.fsdecode(source))
        if isinstance(source, bytearray | memoryview):
            check_bytes(memoryview(source).nbytes, max_bytes, "image bytes")
            return bytes(source)
        if isinstance(source, Mapping):
            return plain_source(_bytes_or_path(source), max_bytes)
        if callable(getattr(source, "read", None)):
            return _stream_bytes(source, max_bytes)
    raise ImageError(
        "image: must be a path, a URL, a data URI, bytes, an open binary file, a dict of bytes or "
        f"path, a Pillow image, an array or a tensor, got {type(source).__name__}"
    )


def data_uri_bytes(uri: str, max_bytes: int) -> bytes:
    """Return the bytes in a ``data:`` URI with base64, in either alphabet, padded or not.

    White space is ignored, and percent-encoding is decoded.

    Raises:
        ImageError: The URI is not valid base64, or holds more than ``max_bytes`` bytes.
    """
    # The head is short, but the rest may be long
    comma = uri[:1024].find(",")
    if comma < 0 or not uri[:comma].lower().endswith(";base64"):
        # What follows a comma may be the image, which may be private
        got = repr(uri[: min(comma, 40)]) if comma >= 0 else "no comma"
        raise ImageError(f"data URI: must hold ';base64,' and the image, got {got}")
    # The size is estimated before anything is copied. Percent-encoding takes three characters for
    # one.
    skipped = sum(map(uri.count, _WHITE_SPACE)) + 2 * uri.count("%")
    check_bytes((len(uri) - comma - skipped) * 3 // 4 - 3, max_bytes, "data URI")
    payload = uri[comma + 1 :]
    if "%" in payload:
        payload = unquote_to_bytes(payload).decode("latin-1")
    payload = payload.translate(_TO_PLAIN_BASE64)
    digits = payload.rstrip("=")
    wanted = -len(digits) % 4
    try:
        if len(payload) - len(digits) not in (0, wanted):
            raise ValueError("padding")
        data = base64.b64decode(digits + "=" * wanted, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("data URI: must be base64, got other characters or padding") from None
    check_bytes(len(data), max_bytes, "data URI")
    return data


def file_url_path(url: str) -> Path:
    """Return the path that a ``file://`` URL names on this host, with percent-encoding decoded.

    Raises:
        MediaNotAllowedError: The URL names another host.
        ImageError: The URL has a query or a fragment.
    """
    host, slash, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost"):
        raise MediaNotAllowedError(
            "file URL: must be file:///path or file://localhost/path, got the host "
            f"{short_repr(host.rpartition('@')[2])}"
        )
    if not set(path).isdisjoint("?#"):
        raise ImageError("file URL: must write '?' and '#' of a name as %3F and %23, got them bare")
    return Path(os.fsdecode(unquote_to_bytes(slash + path)))


def check_bytes(size: int, max_bytes: int, name: str) -> None:
    """Check the size of ``name`` in bytes.

    Raises:
        ImageError: It is above ``max_bytes``.
    """
    if size > max_bytes:
        raise ImageError(f"{name}: must have at most {max_bytes} bytes, got {size}")


def _bytes_or_path(stored: Mapping[Any, Any]) -> Any:
    given = {key: value for key, value in stored.items() if value is not None}
    if not given or not given.keys() <= {"bytes", "path"}:
        raise ImageError(
            f"image: a dict must have 'bytes' or 'path' and nothing else, got {short_repr(given)}"
        )
    if "bytes" in given:
        if not isinstance(given["bytes"], bytes | bytearray | memoryview):
            raise ImageError(f"image: 'bytes' must be bytes, got {type(given['bytes']).__name__}")
        return given["bytes"]
    if not isinstance(given["path"], str | os.PathLike):
        raise ImageError(f"image: 'path' must be a path, got {short_repr(given['path'])}")
    return given["path"]


def _stream_bytes(stream: Any, max_bytes: int) -> bytes:
    """Read an open file from its beginning, as Pillow does, and restore its position.

    A stream that cannot seek is read from its position.

    Raises:
        ImageError: The stream does not return bytes, or has more than ``max_bytes`` of them.
    """
    parts: list[bytes] = []
    size = 0
    with alone_with(stream):
        can_seek = hasattr(stream, "seekable") and stream.seekable()
        place = stream.tell() if can_seek else 0
        if can_seek:
            stream.seek(0)
        try:
            while True:
                part = stream.read(min(_READ_AT_ONCE, max_bytes - size + 1))
                if not isinstance(part, bytes):
                    raise ImageError(
                        "image file: must be open in binary mode, got "
                        f"{type(part).__name__} from it"
                    )
                if not part:
                    return b"".join(parts)
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise ImageError(f"image file: must have at most {max_bytes} bytes, got more")
        finally:
            if can_seek:
                stream.seek(place)
