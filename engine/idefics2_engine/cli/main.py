"""The entry of the command, which handles Ctrl-C before it imports anything slow."""

import os
import signal

# Type checkers treat this name like typing.TYPE_CHECKING. Defining it avoids importing typing
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the command line ``argv`` and return the exit code.

    With ``None`` it is the process's own, and so is the process: Ctrl-C ends it at once, and
    standard streams that are closed are no longer free for the next file that is opened.

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

    Where it is ignored, as behind nohup, it stays so.

    ``KeyboardInterrupt`` would not do: raised while modules are imported it aborts the
    initialization of a C++ extension, or shows as a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(_signal: int, _frame: object) -> None:
    try:
        os.write(2, b"idefics2: interrupted\n")
    finally:  # also where standard error is closed
        os._exit(130)
