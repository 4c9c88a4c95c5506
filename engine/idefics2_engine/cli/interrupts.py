"""Handling of Ctrl-C in a conversation, which raises ``KeyboardInterrupt`` only at chosen places.

Ctrl-C ends one answer and cannot separate two statements that belong together.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class KeptInterrupts:
    """A context manager that raises ``KeyboardInterrupt`` for Ctrl-C only within ``raised()``.

    Ctrl-C outside ``raised()`` is kept for the next ``raised()``. The end of the context restores
    the previous handler. If the context is never entered, that handler stays in place.
    """

    def __init__(self) -> None:
        self._is_raised = False
        self._is_kept = False
        self._before: Any = None

    def __enter__(self) -> Self:
        """Install the handler of Ctrl-C in the main thread, unless Ctrl-C is ignored."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        """Restore the previous handler."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Let Ctrl-C raise ``KeyboardInterrupt`` inside, and raise it at once if one was kept."""
        self._is_raised = True
        try:
            if self._is_kept:
                self._is_kept = False
                raise KeyboardInterrupt
            yield
        finally:
            self._is_raised = False

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_kept = not self._is_raised
        if self._is_raised:
            self._is_raised = False
            raise KeyboardInterrupt
