"""Limits of what comes from outside: time and size of compiling a constraint."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from idefics2_engine.errors import SamplingError

if TYPE_CHECKING:
    from llguidance import LLParserLimits

Result = TypeVar("Result")

MOST_SECONDS = 2.0
"""Of CPU time to compile a constraint, so that a busy machine refuses none."""

# A lexer's state has 1 to 2 kB
_MOST_STATES = 100_000


def within(most_seconds: float, function: Callable[[], Result], name: str) -> Result:
    """Return what ``function`` returns, run on a thread of its own.

    Raises:
        SamplingError: It takes more than ``most_seconds`` of CPU time. It goes on, and its result
            is dropped.
    """
    results: list[Result | BaseException] = []
    clocks: list[Callable[[], float]] = []

    def run() -> None:
        clocks.append(_thread_clock())
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, name="idefics2-constraint", daemon=True)
    thread.start()
    left = most_seconds
    while True:
        thread.join(max(left, 1e-3))
        if results or left <= 0:
            break
        left = most_seconds - (clocks[0]() if clocks else 0.0)
    if not results:
        raise SamplingError(
            f"{name} must compile within {most_seconds:g} s of CPU time, got one that takes longer"
        )
    result = results[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _thread_clock() -> Callable[[], float]:
    """Return a clock of this thread's CPU time, for other threads; of time where there is none."""
    begin = time.monotonic()
    if not hasattr(time, "pthread_getcpuclockid"):
        return lambda: time.monotonic() - begin
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def seconds() -> float:
        try:
            return time.clock_gettime(clock)
        except OSError:
            # The thread has ended, so its result is there
            return 0.0

    return seconds


def limits() -> "LLParserLimits":
    """Return the limits of llguidance, whose errors then say nothing of its state."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)


def reason(kind: str, said: str) -> str:
    """Return the error about a constraint of ``kind``, with what llguidance said of it.

    Places in the grammar that was made of the constraint are left out.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = " ".join(line for line in lines if " | " not in line and line != "^")
    begin = text.find("): ")
    text = text[begin + 3 :] if text.startswith("at ") and begin > 0 else text
    return f"{kind} must be a constraint that can be enforced whole, got: {text:.400}"
