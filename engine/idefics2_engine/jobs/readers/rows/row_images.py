"""Images that rows name: their sources for the engine, and their part of a row's key."""

import os
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from idefics2_engine.errors import ImageError
from idefics2_engine.images.loader import MAX_BYTES, MediaConfig, has_scheme, named_bytes
from idefics2_engine.images.sources.source_forms import file_url_path
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.json_line import json_type

_MOST_KEPT = 4096
_LONGEST_NAME = 4096


class RowImage(NamedTuple):
    """An image of a row.

    Attributes:
        source: What the engine reads: bytes, or the text of a path, a URL or a data URI.
        identity: JSON data that changes when the image does.
    """

    source: str | bytes
    identity: tuple[str | int, ...]


class RowImages:
    """Images of rows, none of which is decoded.

    Args:
        root: Folder from which paths start, and which files must be in. The engine checks that
            when it opens a file.
        hash_media: Whether identities have the content of files.
        max_bytes: Larger files have no content for the engine.
    """

    def __init__(self, root: Path, hash_media: bool = False, max_bytes: int = MAX_BYTES) -> None:
        self._root = os.path.abspath(root)
        self._below = os.path.join(self._root, "")
        self._hash_media = hash_media
        self._media = MediaConfig(allowed_media_root=Path(self._root), max_media_bytes=max_bytes)
        # Several rows often ask about one image
        self._kept_file = lru_cache(_MOST_KEPT)(self._read_file)

    def read_all(self, value: Any, name: str) -> list[RowImage]:
        """Return the images of a column: one, or a list of them.

        Raises:
            BadRowError: A value is no image.
        """
        if value is None:
            return []
        values = value if isinstance(value, list | tuple) else [value]
        return [self.read(one, f"{name}[{index}]") for index, one in enumerate(values)]

    def read(self, value: Any, name: str) -> RowImage:
        """Return one image: a path, an address, bytes, or a dict of bytes and path.

        Raises:
            BadRowError: The value is something else.
        """
        if isinstance(value, Mapping):
            value = _bytes_or_path(value, name)
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
            return RowImage(data, ("bytes", sha256(data).hexdigest()))
        if not isinstance(value, str) or not value:
            got = "''" if value == "" else json_type(value)
            raise BadRowError(
                "schema", f"{name} must be a path, an address, or bytes of an image, got {got}"
            )
        if value[:5].lower() == "data:":
            digest = sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
            return RowImage(value, ("data_uri", digest))
        if has_scheme(value):
            path = _local_path(value)
            return RowImage(value, ("url", value)) if path is None else self._file(path)
        return self._file(value)

    def _file(self, name: str) -> RowImage:
        # No file has a longer name, and long ones are not kept
        return self._kept_file(name) if len(name) <= _LONGEST_NAME else self._read_file(name)

    def _read_file(self, name: str) -> RowImage:
        path = os.path.join(self._root, name)
        normal = os.path.normpath(path) if ".." in name else path
        # The system is not asked about files that the engine will refuse
        is_below = normal.startswith(self._below)
        identity = ("file", path[len(self._below) :] if is_below else name)
        if not is_below:
            return RowImage(path, identity)
        if self._hash_media:
            try:
                _, data = named_bytes(path, self._media)
            except ImageError:
                # What is no image to the engine has no content
                pass
            else:
                return RowImage(path, (*identity, sha256(data).hexdigest()))
        try:
            status = os.stat(path)
        # A null character and half of a surrogate pair are a ValueError
        except (OSError, ValueError):
            return RowImage(path, identity)
        return RowImage(path, (*identity, status.st_size, status.st_mtime_ns))


def _local_path(url: str) -> str | None:
    """Return the path of a ``file://`` URL of this host, and ``None`` for other URLs."""
    try:
        return os.fspath(file_url_path(url)) if url[:5].lower() == "file:" else None
    except ImageError:
        return None


def _bytes_or_path(stored: Mapping[Any, Any], name: str) -> Any:
    """Return the bytes of a dict as ``datasets`` stores images, or its path."""
    given = {key: value for key, value in stored.items() if value is not None}
    if not given or not given.keys() <= {"bytes", "path"}:
        raise BadRowError("schema", f"{name} must have 'bytes' or 'path' and nothing else")
    value = given.get("bytes", given.get("path"))
    if "bytes" in given and not isinstance(value, bytes | bytearray | memoryview):
        raise BadRowError("schema", f"{name}: 'bytes' must be bytes, got {json_type(value)}")
    return value
