"""Interrupts at a chosen line of the engine's code."""

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def run_until(line: int, call: Callable[[], Any]) -> int:
    """Run ``call`` and raise ``KeyboardInterrupt`` at the engine's line number ``line`` in it.

    Only lines on this thread count. No line is interrupted if ``line`` is -1.

    Returns:
        The lines that were run.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if "idefics2_engine" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    # Otherwise a finalizer might get the interrupt instead of the call
    gc.collect()
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
        gc.enable()
    return count
