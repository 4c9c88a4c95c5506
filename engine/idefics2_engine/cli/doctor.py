"""The command ``idefics2 doctor``, which says what of this machine helps or hinders the engine."""

import argparse
from typing import Any

from idefics2_engine.cli import streams
from idefics2_engine.cli.log_output import add_log_options

_EPILOG = """\
examples:
  idefics2 doctor
  idefics2 doctor --deep --json
  idefics2 doctor --model path/to/idefics2-8b

exit codes: 0 no problem, 1 a problem, 2 wrong usage
"""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine: versions, GPU, memory, caches, host",
        description="Check versions, the GPU and its driver, memory, caches and the host, one line "
        "a check, each with its fix. Nothing is downloaded, and torch is not imported without "
        "--deep.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also start a process that imports torch and Triton, says which kernels run here, and "
        "compares three of them with the reference",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="compare memory with this model: a folder, or a hub id that is in the cache (default: "
        "the shape of idefics2-8b)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, not lines")
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code.

    Raises:
        ConfigError: ``--model`` is neither a folder nor in the cache, or its config is malformed.
    """
    from idefics2_engine.doctor import report
    from idefics2_engine.doctor.check import Status, worst
    from idefics2_engine.doctor.examination import examine
    from idefics2_engine.doctor.machine import Machine

    checks = []
    for check in examine(Machine(), args.model, deep=args.deep):
        checks.append(check)
        if not args.json:
            print(report.check_line(check), flush=True)
    if args.json:
        streams.print_json(report.to_dict(checks, deep=args.deep))
    else:
        print(report.summary_line(checks))
    return 1 if worst(checks) is Status.PROBLEM else 0
