"""Priority of the engine's thread for Python's interpreter: preparation of rows waits for steps."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """A gate that is closed while the engine's thread plans and launches a step.

    One thread at a time runs Python code. A thread that has released the interpreter's lock, as
    each launch does, gets it back only after 5 ms while another thread computes. So threads that
    prepare rows wait here in front of each row.

    Args:
        is_used: Whether the gate ever closes. On a CPU a launch is the computation itself, and
            preparation has to run beside it.
    """

    def __init__(self, is_used: bool) -> None:
        self._is_used = is_used
        self._open = threading.Event()
        self._open.set()

    @property
    def is_open(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._open.is_set()

    def wait(self) -> None:
        """Wait until the gate is open, on any thread but the engine's."""
        self._open.wait()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep the gate closed, on the engine's thread."""
        if self._is_used:
            self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open a closed gate for a while, in which the engine's thread sleeps."""
        self._open.set()
        try:
            yield
        finally:
            if self._is_used:
                self._open.clear()
