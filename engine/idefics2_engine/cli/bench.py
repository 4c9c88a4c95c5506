"""``idefics2 bench``: run a benchmark of the folder ``bench``, which lies in an installed package too."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = (_PACKAGE / "bench").is_dir()
_BENCH = _PACKAGE / "bench" if _INSTALLED else _PACKAGE.parents[1] / "bench"
_SUITES = {
    "kernels": "micro.py",
    "latency": "latency.py",
    "load": "load.py",
    "offline": "offline.py",
}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the kernels or the whole model on this machine",
        description="Run a suite of benchmarks: kernels, latency (decode steps, images, prefill), load (a "
        "checkpoint) or offline (many requests); `idefics2 bench SUITE --help` lists its options.",
        allow_abbrev=False,
    )
    parser.add_argument("suite", choices=tuple(_SUITES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the suite")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suite's script as its own command line would; return its exit code."""
    script = _BENCH / _SUITES[args.suite]
    sys.path.insert(0, str(_BENCH))
    sys.argv = [str(script), *args.arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0
    return 0
