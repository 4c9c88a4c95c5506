"""Replacement of Pillow's errors and warnings by ``ImageError``."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from idefics2_engine.errors import ImageError, ImageWarning

# The comment in the pattern distinguishes this filter from all others
_FROM_PILLOW = r"PIL\.(?#idefics2)"


@contextmanager
def guard_pillow(message: str) -> Iterator[None]:
    """Convert Pillow's exceptions to ``ImageError(message)`` and suppress its warnings.

    Pillow's plugins raise many classes of errors on damaged files, and some messages contain memory
    addresses. Its warnings could become errors by the caller's filters.
    """
    try:
        with _HUSH:
            yield
    except (ImageError, ImageWarning):
        raise
    except Exception:
        raise ImageError(message) from None


class _Hush:
    """A filter against Pillow's warnings, there while any thread reads.

    ``warnings.catch_warnings`` is not made for threads: the last to leave would bring back what the
    last to enter found. Here the first adds one filter and the last removes it again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._lists: list[Any] = []  # the filters may be another list by the time we leave

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                warnings.filterwarnings("ignore", module=_FROM_PILLOW)
                self._lists.append(warnings.filters)

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._lists.append(warnings.filters)
                for filters in self._lists:
                    filters[:] = [one for one in filters if not _is_ours(one)]
                self._lists.clear()


def _is_ours(entry: tuple[Any, ...]) -> bool:
    return getattr(entry[3], "pattern", None) == _FROM_PILLOW


_HUSH = _Hush()
