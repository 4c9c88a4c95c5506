"""Files of the input as bytes, with ``.gz`` and ``.zst`` unpacked."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, cast

from idefics2_engine.jobs.job_errors import JobError, reason_of
from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.readers.files.named_files import Name, shown_name
from idefics2_engine.jobs.readers.files.opened_files import open_input

COMPRESSIONS = (".gz", ".zst")
_BUFFER = 1 << 18
# One byte of zstd can become 32 KiB
_PACKED_AT_ONCE = 1 << 10
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


@contextmanager
def open_unpacked(name: Name) -> Iterator[BinaryIO]:
    """Open a file or an address as a context manager that yields its unpacked bytes.

    Raises:
        JobError: The file cannot be opened or read, or its compressed data are damaged, also inside
            the ``with`` statement.
        ConfigError: A library is missing.
    """
    try:
        with open_input(name) as packed, _unpack(packed, str(name)) as unpacked:
            yield unpacked
    except Exception as error:
        # One of the classes is in an optional library
        is_damage = isinstance(error, _DAMAGE) or type(error).__name__ == "ZstdError"
        if is_damage:
            raise JobError(
                f"{shown_name(name)}: cannot be unpacked: its compressed data are damaged"
            ) from error
        if isinstance(error, OSError):
            raise JobError(f"{shown_name(name)}: cannot be read: {reason_of(error)}") from error
        raise


def _unpack(packed: IO[bytes], name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(cast(Any, gzip.open(packed)), _BUFFER))
    if name.endswith(".zst"):
        zstandard = import_extra("zstandard", "parquet")
        frames = _ZstdFrames(packed, zstandard.ZstdDecompressor().decompressobj)
        return cast(BinaryIO, io.BufferedReader(frames, _BUFFER))
    return cast(BinaryIO, packed)


class _ZstdFrames(io.RawIOBase):
    """Unpacks frames. The library's own reader does not notice that a file was cut."""

    def __init__(self, packed: IO[bytes], new_frame: Callable[[], Any]) -> None:
        super().__init__()
        self._packed = packed
        self._new_frame = new_frame
        self._frame: Any = None
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack some bytes.

        Raises:
            EOFError: The last frame has no end.
        """
        while not self._unpacked:
            is_between = self._frame is None or self._frame.eof
            packed = b"" if self._frame is None else self._frame.unused_data
            packed = packed or self._packed.read(_PACKED_AT_ONCE)
            if not packed and is_between:
                return 0
            if not packed:
                raise EOFError
            if is_between:
                self._frame = self._new_frame()
            self._unpacked = memoryview(self._frame.decompress(packed))
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size
