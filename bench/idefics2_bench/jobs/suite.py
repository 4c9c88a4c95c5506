"""Figures of offline jobs: ``idefics2 bench jobs``.

    idefics2 bench jobs --shrink 8  # all cases, runs with the demo checkpoint
    idefics2 bench jobs --random-weights tests/data/idefics2-8b --case run-2000 --json h200-jobs.json
    idefics2 bench jobs --case journal-25000 --case resume-100000 --case first-row --rounds 3

Cases, where N is a number of rows:

- ``run-N``: rows of the workload ``mixed`` of ``bench offline``, as JPEG files and JSONL, through
  the runner of ``idefics2 run`` and through ``LLM.iterate``, on the same rows with empty caches
- ``run-N-one-thread``: the runner with one thread and no process for images
- ``journal-N``: rows with and without a journal, at 5,000 rows a second and at full speed, with a
  stand-in for the model
- ``resume-N``: from the start of a job with N journalled rows to its first new row, with a stand-in
- ``plan-N``, ``plan-N-headers``: ``idefics2 plan``, without and with headers of images
- ``check-N``: the check before a job, with the existence of images
- ``parent-N``: what the process costs that gives rows to 16 workers, at 5,000 rows a second and at
  full speed, with a stand-in for the model of each
- ``first-row``: from the start of ``idefics2 run`` to the first journalled row, with the demo
  checkpoint on a CPU

The last four, and the workers, run in processes of their own. Their inputs have one image a row, of 4,000 small files.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_bench import machine, model_suite
from idefics2_bench.jobs.first_row import first_row
from idefics2_bench.jobs.input_reading import check_row, plan_row
from idefics2_bench.jobs.journal_cost import journal_cost
from idefics2_bench.jobs.parent_cost import parent_cost
from idefics2_bench.jobs.resume import resume_row
from idefics2_bench.jobs.whole_runs import WholeRuns, run_lines
from idefics2_bench.offline import Results
from idefics2_engine.jobs.plan.image_check import ImageCheck

Row = dict[str, Any]

_FIRST_ROW = "first-row"
_CASE = re.compile(r"(run|journal|resume|plan|check|parent)-([1-9]\d{0,8})(-one-thread|-headers)?")
_VARIANTS = {"run": "-one-thread", "plan": "-headers"}
_GPU_RUN, _CPU_RUN = 2000, 16
_OTHERS = (
    "journal-25000",
    "resume-1000000",
    "plan-1000000",
    "plan-1000000-headers",
    "check-1000000",
    "parent-100000",
    _FIRST_ROW,
)


class Cases:
    """Measures cases by their names.

    Args:
        options: Those of the suite.
        folder: Where files are written.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._runs = WholeRuns(options, folder)

    def measure(self, name: str) -> list[Row]:
        """Return the rows of the case ``name``."""
        if name == _FIRST_ROW:
            rows = [first_row(self._folder / name, self._options.rounds)]
        else:
            kind, count, variant = parts_of(name)
            rows = self._of(kind)(count, variant)
        return [{"kernel": "jobs", "case": self._case_name(name), **row} for row in rows]

    def _of(self, kind: str) -> Callable[[int, str], list[Row]]:
        kinds = {
            "run": self._run,
            "journal": lambda count, _: journal_cost(
                self._folder / f"journal-{count}", count, self._options.rounds
            ),
            "resume": lambda count, _: [resume_row(self._folder / f"resume-{count}", count)],
            "plan": self._plan,
            "check": lambda count, _: [check_row(self._folder / f"input-{count}", count)],
            "parent": lambda count, _: [parent_cost(self._folder / f"parent-{count}", count)],
        }
        return kinds[kind]

    def _run(self, count: int, variant: str) -> list[Row]:
        return self._runs.one_thread(count) if variant else self._runs.beside_iterate(count)

    def _plan(self, count: int, variant: str) -> list[Row]:
        check = ImageCheck.HEADER if variant else ImageCheck.NONE
        return [plan_row(self._folder / f"input-{count}", count, check)]

    def _case_name(self, name: str) -> str:
        if not name.startswith("run-"):
            return name
        shrink = self._options.shrink
        return model_suite.case_name(name, self._options) + (
            f"-shrink{shrink}" if shrink > 1 else ""
        )


def parts_of(name: str) -> tuple[str, int, str]:
    """Return kind, number of rows and variant of a case.

    Raises:
        ValueError: There is no such case.
    """
    found = _CASE.fullmatch(name)
    variant = found[3] or "" if found is not None else ""
    if found is None or variant not in ("", _VARIANTS.get(found[1], "")):
        raise ValueError(f"--case must be one of --help, such as run-2000, got {name!r}")
    return found[1], int(found[2]), variant


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    # Nothing is timed beside it on transformers
    options.no_peer = True
    model_suite.resolve(options, parser)
    names = _names(options, parser)
    about = model_suite.about(options)
    about.setdefault("loop_seconds", round(machine.loop_seconds(), 3))
    results = Results(options.json, about)
    with TemporaryDirectory(prefix="idefics2-jobs-", dir=options.folder) as folder:
        cases = Cases(options, Path(folder))
        for name in names:
            for row in cases.measure(name):
                results.add({**row, "loop_seconds": about["loop_seconds"]})
                print(_lines(row), flush=True)
    results.print_table(options)
    return 0


def _lines(row: Row) -> str:
    """Return the other figures of a row for people who watch."""
    if "thread_seconds" in row:
        return run_lines(row)
    named = ("kernel", "case", "impl", "model", "dtype", "ms", "peer", "peer_ms", "speedup")
    figures = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in row.items()
        if name not in named and not name.endswith("_per_s") and not isinstance(value, list)
    }
    return "  " + ", ".join(f"{name} {value}" for name, value in figures.items())


def _names(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Check the options and return the names of the cases."""
    for name in ("shrink", "rounds"):
        number = getattr(options, name)
        if number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder must be a folder, got {str(options.folder)!r}")
    if not options.case:
        count = _GPU_RUN if options.device.startswith("cuda") else _CPU_RUN
        return [f"run-{count}", f"run-{count}-one-thread", *_OTHERS]
    names: list[str] = options.case
    try:
        for name in names:
            if name != _FIRST_ROW:
                parts_of(name)
    except ValueError as error:
        parser.error(str(error))
    return names


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("jobs", __doc__)
    add = parser.add_argument
    add("--case", action="append", help="only this case; may be repeated")
    add(
        "--rounds",
        type=int,
        default=1,
        help="rounds of run-N, journal-N and first-row, whose median is kept (default: %(default)s)",
    )
    add(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide text tokens and new tokens of run-N by N, for a small machine or model",
    )
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where rows and jobs are written, on the disk that is to be measured (default: that "
        "of temporary files)",
    )
    add("--max-num-seqs", type=int, default=256, help="as LLM's (default: %(default)s)")
    add("--kv-cache-tokens", type=int, help="as LLM's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
