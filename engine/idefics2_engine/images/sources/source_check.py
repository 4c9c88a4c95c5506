"""The check of many image files, each without the cost of resolving its whole path."""

import os
import stat
from functools import lru_cache
from pathlib import Path

from idefics2_engine.images.loader import ImageSource, MediaConfig, check_source, has_scheme

_KEPT_FOLDERS = 4096
_KEPT_FILES = 1 << 16
_LONGEST_NAME = 4096
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


class SourceCheck:
    """Checks images as ``loader.check_source`` does, with the same errors; thread-safe.

    Folders are resolved once, and a file that was good is not looked at again, as long as so many
    are kept. What is not plainly good is left to ``check_source``.

    Args:
        media: Rules for images.
    """

    def __init__(self, media: MediaConfig) -> None:
        self._media = media
        root = media.allowed_media_root
        self._root = None if root is None else os.path.realpath(root)
        self._real_folder = lru_cache(_KEPT_FOLDERS)(self._find_folder)
        self._good: set[str] = set()

    def __call__(self, source: ImageSource) -> None:
        """Check one image.

        Raises:
            ImageError: As in ``check_source``.
        """
        if type(source) is not str or len(source) > _LONGEST_NAME:
            check_source(source, self._media)
            return
        if source in self._good:
            return
        if not self._is_file(source):
            check_source(source, self._media)
        if len(self._good) >= _KEPT_FILES:
            self._good.clear()
        self._good.add(source)

    def _is_file(self, name: str) -> bool:
        """Return whether ``name`` is plainly a good file, and neither a link nor an address."""
        folder, last = os.path.split(name)
        if not last or last in (os.curdir, os.pardir) or has_scheme(name):
            return False
        real = self._real_folder(folder)
        if real is None:
            return False
        try:
            file = os.open(os.path.join(real, last), _FLAGS)
        except (OSError, ValueError):
            return False
        try:
            status = os.fstat(file)
        finally:
            os.close(file)
        return stat.S_ISREG(status.st_mode) and status.st_size <= self._media.max_media_bytes

    def _find_folder(self, folder: str) -> str | None:
        """Return the folder without links, ``None`` unless it is the allowed one or below it."""
        try:
            real = os.path.realpath(folder)
        except (OSError, ValueError):
            return None
        if self._root is not None and not Path(real).is_relative_to(self._root):
            return None
        return real
