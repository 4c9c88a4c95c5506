"""Conversion of Pillow's errors to ``ImageError``, and suppression of its warnings."""

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
    addresses. The caller's filters could turn its warnings into errors.

    Raises:
        ImageError: The code inside raised an exception other than ``ImageWarning``.
    """
    try:
        with _HUSH:
            yield
    except (ImageError, ImageWarning):
        raise
    except Exception:
        raise ImageError(message) from None


class _Hush:
    """A filter of Pillow's warnings that is installed while any thread reads an image.

    ``warnings.catch_warnings`` is not thread-safe: threads that overlap could restore each other's
    filters. Here the first thread to enter adds one filter, and the last to leave removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        # The lists that may contain the filter, as ``warnings.filters`` may be replaced meanwhile
        self._lists: list[Any] = []

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
