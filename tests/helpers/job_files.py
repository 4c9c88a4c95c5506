"""File operations that fail, for tests of jobs. Without torch, and syncing nothing for speed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from idefics2_engine.jobs.store.file_operations import FileOperations

Write = memoryview


class Killed(BaseException):
    """The simulated process is dead. Its clean-up changes nothing, because every call raises it."""


class CountedFiles(FileOperations):
    """Counts the calls that change something, and can interfere with each.

    Attributes:
        calls: The names of the calls so far.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, name: str, fd: int = -1, data: Write | None = None) -> None:
        """Interfere with the call that was counted last by raising an exception."""

    def count(self, name: str, fd: int = -1, data: Write | None = None) -> None:
        self.calls.append(name)
        self.before(name, fd, data)

    def open(self, path: Path, flags: int) -> int:
        self.count("open")
        return super().open(path, flags)

    def write(self, fd: int, data: Write) -> int:
        self.count("write", fd, data)
        return super().write(fd, data)

    def truncate(self, fd: int, num_bytes: int) -> None:
        self.count("truncate")
        super().truncate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        self.count("sync", fd)

    def rename(self, old: Path, new: Path) -> None:
        self.count("rename")
        super().rename(old, new)

    def make_folder(self, path: Path) -> None:
        self.count("make_folder")
        super().make_folder(path)

    def sync_folder(self, path: Path) -> None:
        self.count("sync_folder")


class ShortFiles(CountedFiles):
    """Writes at most ``most`` bytes a call."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def write(self, fd: int, data: Write) -> int:
        return super().write(fd, data[: self.most])


class FailingFiles(CountedFiles):
    """Raises ``OSError`` in the calls of the numbers in ``at``; a write writes its half before."""

    def __init__(self, code: int, at: range) -> None:
        super().__init__()
        self.code = code
        self.at = at

    def before(self, name: str, fd: int = -1, data: Write | None = None) -> None:
        if len(self.calls) - 1 in self.at:
            if data is not None:
                os.write(fd, data[: len(data) // 2])
            raise OSError(self.code, os.strerror(self.code))


class KilledFiles(CountedFiles):
    """Dies in call ``at``, in a write after ``share`` of its bytes."""

    def __init__(self, at: int, share: float = 0.0) -> None:
        super().__init__()
        self.at = at
        self.share = share

    def before(self, name: str, fd: int = -1, data: Write | None = None) -> None:
        if len(self.calls) - 1 == self.at and data is not None:
            os.write(fd, data[: int(len(data) * self.share)])
        if len(self.calls) > self.at:
            self.die()

    def die(self) -> None:
        raise Killed


class SignalledFiles(KilledFiles):
    """Sends SIGKILL to its own process in call ``at``."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class PowerLossFiles(KilledFiles):
    """Dies in call ``at`` and keeps what was synced below ``root``, which is all that survives.

    What was written to a file and not synced is lost. With ``names`` all names survive, as they may
    on a disk that writes them early, and otherwise only those that their folder synced.
    """

    def __init__(self, root: Path, at: int, names: bool = False) -> None:
        super().__init__(at)
        self.all_names = names
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()
        self.keep_names(root)

    def die(self) -> None:
        if self.all_names:
            for folder, _, _ in os.walk(self.root):
                self.keep_names(Path(folder))
        super().die()

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if flags & os.O_CREAT:
            # It is new or emptied, and its number may have been another file's
            self.contents[os.fstat(fd).st_ino] = b""
        return fd

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.keep_content(Path(f"/proc/self/fd/{fd}"))

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.keep_names(path)

    def keep_content(self, path: Path) -> None:
        self.contents[path.stat().st_ino] = path.read_bytes()

    def keep_names(self, folder: Path) -> None:
        entries = list(os.scandir(folder))
        self.names[folder.stat().st_ino] = {one.name: one.inode() for one in entries}
        self.folders |= {one.inode() for one in entries if one.is_dir()}

    def survivors(self) -> Iterator[tuple[Path, bytes | None]]:
        """Yield path and content of what survived; a folder has no content."""
        yield from self.below(Path(), self.root.stat().st_ino)

    def below(self, path: Path, folder: int) -> Iterator[tuple[Path, bytes | None]]:
        for name, inode in self.names.get(folder, {}).items():
            if inode in self.folders:
                yield path / name, None
                yield from self.below(path / name, inode)
            else:
                yield path / name, self.contents.get(inode, b"")
