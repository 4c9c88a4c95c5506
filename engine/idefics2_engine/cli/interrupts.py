"""Ctrl-C in a conversation ends one answer, and never parts two statements that belong together."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class KeptInterrupts:
    """Ctrl-C as ``KeyboardInterrupt`` within ``raised()`` alone.

    Outside it is kept for the next ``raised()``.

    Use as a context, which ends as it began; where it was not entered Ctrl-C does what it did
    before.
    """

    def __init__(self) -> None:
        self._is_raised = False
        self._is_kept = False
        self._before: Any = None

    def __enter__(self) -> Self:
        """Take Ctrl-C over, where it can be had: in the main thread, and unless it is ignored."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        """Give Ctrl-C back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise ``KeyboardInterrupt`` at Ctrl-C in here, and now for one that was kept."""
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
