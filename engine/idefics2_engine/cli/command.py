"""The parser of the command line, and the conversion of errors to messages and exit codes."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from idefics2_engine import __version__
from idefics2_engine.cli import (
    bench,
    chat,
    doctor,
    generate,
    parity,
    quantize,
    streams,
)
from idefics2_engine.cli.jobs import merge, plan
from idefics2_engine.cli.jobs import run as run_command
from idefics2_engine.cli.log_output import log_output
from idefics2_engine.cli.streams import StandardOutputError
from idefics2_engine.errors import Idefics2Error, ImageWarning

_EPILOG = """\
examples:
  idefics2 generate --image shapes.png --prompt "Where is the star?"
  idefics2 generate --image a.png --image b.png --prompt "What's the difference?" --json
  curl -s https://example.org/a.jpg | idefics2 generate --image - --prompt "What is this?"
  idefics2 chat --model HuggingFaceM4/idefics2-8b
  idefics2 plan -i questions.jsonl
  idefics2 run -i questions.jsonl -o answers.jsonl
  idefics2 quantize HuggingFaceM4/idefics2-8b idefics2-8b-nf4
  idefics2 parity ours:reference transformers
  idefics2 doctor

exit codes: 0 answered, 1 failed while running, 2 wrong usage or input, 130 interrupted,
141 the reader of the output left; run, parity and doctor have others, see their --help
"""


class _UsageError(Exception):
    """The command line is invalid."""

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self.command = command


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages do not repeat the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self.prog, f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
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
    plan.add_parser(commands)
    run_command.add_parser(commands)
    merge.add_parser(commands)
    quantize.add_parser(commands)
    parity.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print an ``ImageWarning`` in one line, and other warnings as Python does."""
    if issubclass(category, ImageWarning):
        text = f"idefics2: warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code.

    If ``argv`` is ``None``, it is the process's own command line.

    Raises:
        SystemExit: For ``--help`` and ``--version`` (0).
    """
    with streams.guarded():
        try:
            try:
                code = _run(argv)
            except SystemExit:
                sys.stdout.flush()
                raise
            # An error of the last write can still be reported here
            sys.stdout.flush()
        except StandardOutputError as lost:
            if not lost.reader_left:
                print(f"idefics2: error: {lost}", file=sys.stderr)
            return lost.exit_code
    return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser().parse_args(arguments)
        with warnings.catch_warnings(), log_output(args):
            warnings.showwarning = _show_warning
            code: int = args.run(args)
    except _UsageError as error:
        return _bad_input(error.command, str(error), Idefics2Error.code, "--json" in arguments)
    except Idefics2Error as error:
        return _bad_input("idefics2", str(error), error.code, getattr(args, "json", False))
    # This occurs only in a caller's process. In the command's own, Ctrl-C ends the process.
    except KeyboardInterrupt:
        print("idefics2: interrupted", file=sys.stderr)
        return 130
    return code


def _bad_input(command: str, message: str, code: str, as_json: bool) -> int:
    """Print an error to stderr, with ``as_json`` also to stdout, and return the exit code."""
    # The name of a file may contain bytes that are not text
    message = message.encode(errors="backslashreplace").decode()
    print(f"{command}: error: {message}", file=sys.stderr)
    if as_json:
        streams.print_json({"error": {"code": code, "message": message}})
    return 2
