"""A folder of images: one row a file, in name order. The files are not opened."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.readers.files.named_files import (
    Name,
    is_remote,
    printable,
    reading,
    shown_name,
)
from idefics2_engine.jobs.readers.source import RawRow
from idefics2_engine.jobs.store.input_files import InputFile, as_mtime

# Formats that Pillow reads. Files of those that the engine refuses become rows with an error, so
# that nobody misses them.
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".tga", ".tif",
    ".tiff", ".webp",
})
# fmt: on


class ImageFolderSource:
    """One row for each image below folders, folder by folder in the order of names.

    A row has the column ``images`` with one path. Its identifier is the path below the folder.
    Hidden files, hidden folders and links to folders are skipped. A link to a file out of the
    folder is an error of its row.

    Args:
        paths: Folders. A file is an image of the folder that contains it, whatever its name.
        options: Paths in rows are relative to its ``media_root``, or to the folder if it is None.

    Raises:
        ConfigError: A path is missing, remote or outside ``media_root``.
        JobError: On reading: a folder cannot be listed.
    """

    form = "columns"

    def __init__(self, paths: Sequence[Name], options: object) -> None:
        root = getattr(options, "media_root", None)
        self._media_root = None if root is None else Path(os.path.realpath(root))
        for name in paths:
            if is_remote(name) or not os.path.lexists(name):
                raise ConfigError(
                    f"{shown_name(name)}: must be a local folder of images, or an image"
                )
            if self._media_root and not _real_folder(Path(name)).is_relative_to(self._media_root):
                raise ConfigError(
                    f"{shown_name(name)}: a folder of images must be in the media root"
                )
        self.files = tuple(map(Path, paths))

    def __iter__(self) -> Iterator[RawRow]:
        """Yield the rows of all folders."""
        for path in self.files:
            folder = _real_folder(path)
            images = _images_below(folder) if path.is_dir() else iter([path.name])
            for below in images:
                yield self._row(folder, below)

    def rows_behind(self, count: int) -> Iterator[RawRow]:
        """Yield all rows, none of which is read."""
        return iter(self)

    def _row(self, folder: Path, below: str) -> RawRow:
        place = printable(f"{folder.name}/{below}")
        path = folder / below
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder):
            message = "images[0]: must be in the folder, got a link that leads out of it"
            return RawRow(place, None, RowError("media_not_allowed", "media", message), below)
        image = below
        if self._media_root is not None:
            image = path.relative_to(self._media_root).as_posix()
        # Without the folder, data:a.png would be data
        return RawRow(place, {"images": [f"./{image}" if ":" in image else image]}, None, below)


def identify_folder(path: Path) -> InputFile:
    """Return the identity of a folder, which changes when an image below it does.

    Raises:
        JobError: A folder cannot be listed.
    """
    size, digest = 0, sha256()
    for below in _images_below(_real_folder(path)):
        with reading(path / below):
            status = os.lstat(path / below)
        size += status.st_size
        digest.update(f"{below}\0{status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    return InputFile(str(path.absolute()), size, as_mtime(digest.digest()))


def _real_folder(path: Path) -> Path:
    """Return the folder ``path``, or that which contains the file ``path``, without links."""
    return Path(os.path.realpath(path if path.is_dir() else path.parent))


def _images_below(folder: Path) -> Iterator[str]:
    """Yield the POSIX paths of images below ``folder``, relative to it."""
    pending = [("", True)]
    while pending:
        below, is_folder = pending.pop()
        if not is_folder:
            yield below
            continue
        with reading(folder / below), os.scandir(folder / below) as entries:
            found = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if _is_read(entry)
            )
        start = f"{below}/" if below else ""
        pending += [(f"{start}{name}", is_folder) for name, is_folder in reversed(found)]


def _is_read(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or is named as an image, and is not hidden."""
    if entry.name.startswith("."):
        return False
    if entry.is_dir(follow_symlinks=False):
        return True
    is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
    return is_image and not (entry.is_symlink() and os.path.isdir(entry.path))
