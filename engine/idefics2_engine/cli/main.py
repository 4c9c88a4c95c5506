"""The parser, and what becomes of an error."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from idefics2_engine import __version__
from idefics2_engine.cli import bench, chat, generate, quantize
from idefics2_engine.errors import Idefics2Error, ImageWarning

_EPILOG = """\
examples:
  idefics2 generate --image shapes.png --prompt "Where is the star?"
  idefics2 generate --image a.png --image b.png --prompt "What's the difference?" --json
  idefics2 chat --model HuggingFaceM4/idefics2-8b
  idefics2 quantize HuggingFaceM4/idefics2-8b idefics2-8b-nf4

exit codes: 0 answered, 1 failed while running, 2 wrong usage or input, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="idefics2",
        description="Idefics2 answers questions about images.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"idefics2-engine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_parser(commands)
    chat.add_parser(commands)
    quantize.add_parser(commands)
    bench.add_parser(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours in one line, and others as Python does."""
    if issubclass(category, ImageWarning):
        text = f"idefics2: warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's own if None) and return the exit code.

    Raises:
        SystemExit: For ``--help`` and ``--version`` (0) and for a command line that makes no sense (2).
    """
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code: int = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except Idefics2Error as error:
        message = (
            str(error).encode(errors="backslashreplace").decode()
        )  # a file's name may be no text
        if getattr(args, "json", False):  # who reads standard output as JSON gets JSON in any case
            print(json.dumps({"error": {"code": error.code, "message": message}}))
        print(f"idefics2: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("idefics2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as in `| head`: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
