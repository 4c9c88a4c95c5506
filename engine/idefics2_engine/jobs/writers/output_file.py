"""The file of an output that is being written, and the format of its rows."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from idefics2_engine.jobs.store.file_operations import REPLACE, FileOperations, write_all

_BUFFER_BYTES = 1 << 20


class OutputFile:
    """Writes bytes and hashes them. A new one replaces the file's content.

    Attributes:
        size: Bytes that were written.
    """

    def __init__(self, path: Path, files: FileOperations | None = None) -> None:
        self._files = files or FileOperations()
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._fd: int | None = self._files.open(path, REPLACE)
        self.size = 0

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> int:
        """Write ``data``; return its number of bytes.

        Raises:
            OSError: Writing failed. The file is closed, because what it has is not known.
        """
        self._buffer += data
        self._hash.update(data)
        self.size += len(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Pass everything to the system; raise as ``write`` does."""
        if self._fd is None:
            raise ValueError("the output is closed")
        data, self._buffer = bytes(self._buffer), bytearray()
        try:
            write_all(self._files, self._fd, data)
        except BaseException:
            self.close()
            raise

    def sync(self) -> None:
        """Wait until everything is on the disk; raise as ``write`` does."""
        self.flush()
        assert self._fd is not None
        try:
            self._files.sync(self._fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file without writing what is buffered. A second call does nothing."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._files.close(fd)


class OutputFormat(Protocol):
    """Writes rows to an ``OutputFile``, so that equal rows give equal bytes."""

    def write_row(self, row: bytes) -> None:
        """Write a row, which is a JSON object on one line, as the journal has it."""

    def finish(self) -> None:
        """Write what belongs behind the last row."""


MakeFormat = Callable[[OutputFile], OutputFormat]


class JsonlFormat:
    r"""Rows as lines, each with ``\n``."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file

    def write_row(self, row: bytes) -> None:
        """Write a row."""
        self._file.write(row + b"\n")

    def finish(self) -> None:
        """Do nothing, because nothing is behind the last row."""
