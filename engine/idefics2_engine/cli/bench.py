"""The command ``idefics2 bench``, which runs a suite of ``idefics2_bench``."""

import argparse
import importlib
from typing import Any

from idefics2_engine.cli.log_output import add_log_options, log_output

_SUITES = {
    "kernels": "kernels",
    "latency": "latency",
    "steps": "steps.suite",
    "load": "checkpoint_loading",
    "offline": "offline",
    "jobs": "jobs.suite",
    "hf": "hf.suite",
    "structured": "structured",
    "report": "results.page",
    "compare": "results.compare",
}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the kernels or the whole model on this machine",
        description="Run a suite of benchmarks: kernels, latency (decode steps, images, prefill), "
        "steps (divided by operation), load (a checkpoint), offline (many requests), jobs "
        "(idefics2 run), hf (transformers' classes) or structured (constrained answers). Or show results files: report (a page) and "
        "compare (what got slower). "
        "`idefics2 bench SUITE --help` lists its options. -v and --log-level may come before or "
        "after the suite.",
        allow_abbrev=False,
    )
    parser.add_argument("suite", choices=tuple(_SUITES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the suite")
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suite as its own command line would and return its exit code."""
    suite = importlib.import_module(f"idefics2_bench.{_SUITES[args.suite]}")
    after = argparse.ArgumentParser("idefics2 bench", add_help=False, allow_abbrev=False)
    add_log_options(after)
    try:
        log_options, arguments = after.parse_known_args(args.arguments)
        with log_output(log_options):
            code: int = suite.main(arguments)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0
    return code
