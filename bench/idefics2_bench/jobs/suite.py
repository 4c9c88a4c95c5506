"""Figures of offline jobs: ``idefics2 bench jobs``.

    idefics2 bench jobs --shrink 8  # the demo checkpoint, small numbers of rows
    idefics2 bench jobs --random-weights tests/data/idefics2-8b --case run-2000 --json h200-jobs.json

Cases, where N is a number of rows:

- ``run-N``: rows of the workload ``mixed`` of ``bench offline``, as JPEG files and JSONL, through
  the runner of ``idefics2 run`` and through ``LLM.iterate``, on the same rows with empty caches
- ``run-N-one-thread``: the runner with one thread for images
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_bench import machine, model_suite
from idefics2_bench.jobs.whole_runs import WholeRuns, run_lines
from idefics2_bench.offline import Results

Row = dict[str, Any]

_CASE = re.compile(r"(run)-([1-9]\d{0,8})(-one-thread)?")
_GPU_RUN, _CPU_RUN = 2000, 16


@dataclass(frozen=True)
class Case:
    """A case by the parts of its name: what is measured, how many rows, and how."""

    kind: str
    count: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the case in rows."""
        return f"{self.kind}-{self.count}{self.variant}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.no_peer = True
    model_suite.resolve(options, parser)
    cases = _cases(options, parser)
    about = model_suite.about(options)
    about.setdefault("loop_seconds", round(machine.loop_seconds(), 3))
    results = Results(options.json, about)
    with TemporaryDirectory(prefix="idefics2-jobs-", dir=options.folder) as folder:
        runs = WholeRuns(options, Path(folder))
        for case in cases:
            measure = runs.one_thread if case.variant else runs.beside_iterate
            name = model_suite.case_name(case.name, options)
            if options.shrink > 1:
                name += f"-shrink{options.shrink}"
            for figures in measure(case.count):
                row = {"kernel": "jobs", "case": name, **figures}
                results.add({**row, "loop_seconds": about["loop_seconds"]})
                print(run_lines(row), flush=True)
    results.print_table(options)
    return 0


def _cases(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """Check the options and return the cases."""
    for name in ("shrink", "rounds"):
        number = getattr(options, name)
        if number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder must be a folder, got {str(options.folder)!r}")
    count = _GPU_RUN if options.device.startswith("cuda") else _CPU_RUN
    cases = []
    for name in options.case or [f"run-{count}", f"run-{count}-one-thread"]:
        found = _CASE.fullmatch(name)
        if found is None:
            parser.error(f"--case must be a case of --help, such as run-2000, got {name!r}")
        cases.append(Case(found[1], int(found[2]), found[3] or ""))
    return cases


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("jobs", __doc__)
    add = parser.add_argument
    add("--case", action="append", help="only this case; may be repeated")
    add("--rounds", type=int, default=1, help="rounds of run-N (default: %(default)s)")
    add(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide text tokens and new tokens by N, for a small machine or model",
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
