"""Calls to the operating system that change files, in one object that tests replace."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

READ = os.O_RDONLY
APPEND = os.O_RDWR | os.O_APPEND
CREATE = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
REPLACE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


class FileOperations:
    """Calls the operating system. Every method may raise ``OSError``."""

    def open(self, path: Path, flags: int) -> int:
        """Return a descriptor of ``path``, which must not be a link; children don't inherit it."""
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        """Write the beginning of ``data``; return its number of bytes."""
        return os.write(fd, data)

    def read_at(self, fd: int, num_bytes: int, offset: int) -> bytes:
        """Return at most ``num_bytes`` from ``offset``."""
        return os.pread(fd, num_bytes, offset)

    def lines(self, path: Path) -> Iterator[bytes]:
        r"""Yield the lines of ``path`` with their ``\n``, which the last one may lack."""
        with open(path, "rb") as file:
            yield from file

    def size(self, fd: int) -> int:
        """Return the size in bytes."""
        return os.fstat(fd).st_size

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut the file to ``num_bytes``."""
        os.ftruncate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        """Wait until the content is on the disk."""
        os.fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or a folder; a file at ``new`` is replaced at once."""
        os.rename(old, new)

    def make_folder(self, path: Path) -> None:
        """Make one folder, which must not exist."""
        os.mkdir(path)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in the folder are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot sync a folder and write its names at once
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)


def write_all(files: FileOperations, fd: int, data: bytes) -> None:
    """Write all of ``data``, in one call unless the system writes a part of it.

    Raises:
        OSError: A part of ``data`` may have been written.
    """
    rest = memoryview(data)
    while rest:
        written = files.write(fd, rest)
        if not written:
            raise OSError(errno.EIO, "a write returned without writing")
        rest = rest[written:]


def replace_file(files: FileOperations, path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader finds all of the old or all of the new content.

    The new content is on the disk on return.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    fd = files.open(temporary, REPLACE)
    try:
        write_all(files, fd, data)
        files.sync(fd)
    finally:
        files.close(fd)
    files.rename(temporary, path)
    files.sync_folder(path.parent)


def move_aside(files: FileOperations, path: Path) -> Path:
    """Rename ``path`` to the first free of ``path.1``, ``path.2``, …; return the new path."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{number}")):
        number += 1
    files.rename(path, aside)
    files.sync_folder(path.parent)
    return aside
