"""Files of the input as bytes, with ``.gz`` and ``.zst`` unpacked."""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from idefics2_engine.errors import ConfigError
from idefics2_engine.model_files import printable_path

COMPRESSIONS = (".gz", ".zst")
_BUFFER = 1 << 18
# One byte of zstd can become 32 KiB
_PACKED_AT_ONCE = 1 << 10


def is_remote(name: str) -> bool:
    """Return whether a name of the operator's is an address that fsspec opens."""
    return name.startswith(("s3://", "gs://"))


@contextmanager
def open_unpacked(name: str) -> Iterator[BinaryIO]:
    """Open a file or an address as a context manager that yields its unpacked bytes.

    Raises:
        ConfigError: The file cannot be opened, or its compressed data are damaged, also inside the
            ``with`` statement. Or a library is missing.
    """
    try:
        with _open(name) as packed, _unpack(packed, name) as unpacked:
            yield unpacked
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(name) from error
    except FileNotFoundError:
        raise ConfigError(f"{_shown(name)}: must be an input file, got no such file") from None
    except PermissionError as error:
        raise ConfigError(f"{_shown(name)}: cannot be read: {error.strerror}") from None
    except Exception as error:
        # The class is in an optional library
        if type(error).__name__ == "ZstdError":
            raise _damaged(name) from error
        raise


def _open(name: str) -> BinaryIO:
    if is_remote(name):
        from idefics2_engine.jobs.readers.remote_files import open_remote

        return cast(BinaryIO, open_remote(name))
    # A pipe would block, and a job reads its input several times
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        got = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ConfigError(f"{_shown(name)}: must be a file that can be read twice, got {got}")
    return os.fdopen(fd, "rb", buffering=_BUFFER)


def _unpack(packed: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(cast(Any, gzip.open(packed)), _BUFFER))
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                f"{_shown(name)}: needs the package zstandard: "
                "pip install 'idefics2-engine[parquet]'"
            ) from None
        frames = _ZstdFrames(packed, zstandard.ZstdDecompressor().decompressobj)
        return cast(BinaryIO, io.BufferedReader(frames, _BUFFER))
    return packed


class _ZstdFrames(io.RawIOBase):
    """Unpacks frames. The library's own reader does not notice that a file was cut."""

    def __init__(self, packed: BinaryIO, new_frame: Callable[[], Any]) -> None:
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


def _damaged(name: str) -> ConfigError:
    return ConfigError(f"{_shown(name)}: cannot be unpacked: its compressed data are damaged")


def _shown(name: str) -> str:
    return printable_path(Path(name)) if not is_remote(name) else name
