"""The entry point of the command, which handles Ctrl-C before it imports anything slow."""

import os
import signal

# Type checkers treat this name like typing.TYPE_CHECKING. Defining it avoids importing typing.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the command line ``argv`` and return the exit code.

    If ``argv`` is ``None``, it is the process's own command line, and the command may change the
    process: Ctrl-C ends it at once, and closed standard streams are opened on the null device.

    Raises:
        SystemExit: For ``--help`` and ``--version`` (0).
    """
    if argv is None:
        _end_at_interrupts()
    from idefics2_engine.cli import command, streams

    if argv is None:
        streams.occupy_descriptors()
    return command.run(argv)


def _end_at_interrupts() -> None:
    """Let Ctrl-C end the process with exit code 130 and one line.

    Any handler other than Python's default stays, so Ctrl-C remains ignored if it was.
    ``KeyboardInterrupt`` is not used, because during an import it aborts the initialization of a
    C++ extension or prints a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(_signal: int, _frame: object) -> None:
    try:
        os.write(2, b"idefics2: interrupted\n")
    finally:
        # The process also ends if standard error is closed
        os._exit(130)
