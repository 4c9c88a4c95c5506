"""Ctrl-C and SIGTERM while a job runs: the first ends it softly, the second at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST = (
    b"\nidefics2: no more rows are read, those in flight are finished; again Ctrl-C stops at once\n"
)


@contextmanager
def interrupts_handled(interrupt: Callable[[], bool]) -> Iterator[None]:
    """Call ``interrupt`` for each of the first two signals; the next one ends the process.

    Where it returns False, ``KeyboardInterrupt`` is raised. Signals that are ignored stay so, and
    outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.getsignal(number)
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    count = 0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            restore()
        is_noticed = interrupt()
        if not is_noticed:
            raise KeyboardInterrupt
        if count == 1:
            # Standard error may be closed
            with suppress(OSError):
                os.write(2, _FIRST)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
