"""Time the catalog's kernels at the model's shapes beside peers: ``idefics2 bench kernels``.

    idefics2 bench kernels  # all kernels, as a table
    idefics2 bench kernels --json h200-kernels.json --report h200-kernels.html
    idefics2 bench kernels --kernel flash_attention --case text-causal-16k
    idefics2 bench kernels --kernel rms_norm --base main  # beside the kernel of another commit
    idefics2 bench kernels --kernel rms_norm --mine my_kernels:rms_norm  # beside one of yours

A kernel whose result is wrong is not timed. A CUDA device is required. With --mine the function is
first checked on the catalog's small cases, which needs no CUDA device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from idefics2_bench import machine, report
from idefics2_bench.kernel_peers import prepared
from idefics2_bench.own_kernel import load_function, print_checks, with_mine
from idefics2_bench.results.chart_looks import MINE
from idefics2_bench.results.page import add_report_option, write_report
from idefics2_bench.timing import Call, Time, measure, num_copies
from idefics2_engine.errors import Idefics2Error
from idefics2_kernels.catalog import Case, Inputs, KernelSpec, rows
from idefics2_kernels.catalog.criterion import case_error

_ROOT = Path(__file__).resolve().parents[2]
# Most bytes of all sets of inputs of a case
_MOST_BYTES = 24 << 30

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 0, 1 if a kernel's result was wrong, or 2 without a CUDA device.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    mine = None
    if options.mine:
        if len(options.kernel or ()) != 1:
            parser.error("--mine needs the operation that it computes: one --kernel")
        mine = with_mine(options.kernel[0], load_function(options.mine))
    has_gpu = torch.cuda.is_available()
    if mine is None and not has_gpu:
        print("bench: needs a CUDA device, found none", file=sys.stderr)
        return 2
    checks = [] if mine is None else print_checks(mine, options.mine, options.case, has_gpu)
    wrong = any(one.verdict in ("wrong", "failed") for one in checks)
    left_out = {one.case.name for one in checks if one.verdict != "right"}
    if not has_gpu:
        print("not timed: needs a CUDA device, found none", file=sys.stderr)
        return int(wrong)
    about = machine.describe()
    if options.commit:
        about["commit"] = options.commit
    base = _base_rows(options) if options.base else {}
    results: list[Row] = []
    for (kernel, case_name), members in _chosen(options, parser).items():
        spec, case = members[0][0], members[0][2]
        implementations = [implementation for _, implementation, _ in members]
        if mine is not None:
            spec = mine
            implementations = [MINE] * (case_name not in left_out) + implementations
        moved = spec.cost(case).bytes
        copies = max(1, min(num_copies(moved), _MOST_BYTES // max(1, moved)))
        try:
            case_rows = bench_case(spec, implementations, case, about, torch.device("cuda"), copies)
        except RuntimeError as error:
            if MINE not in implementations:
                raise
            raise Idefics2Error(
                f"--mine: {options.mine} must run in a CUDA graph, where it cannot wait for the "
                f"device (.item(), .tolist()); {case_name} failed: {error}"
            ) from error
        for row in case_rows:
            if (earlier := base.get((kernel, case_name, row["impl"]))) is not None:
                row |= {"base_ms": earlier, "base_speedup": earlier / row["ms"]}
            results.append(row)
            print(report.line(row), flush=True)
        report.write_json(options.json, about, results)
    print()
    print(report.table(about, results))
    write_report(options.report, about, results)
    return int(wrong or any(row["error"] > 1 for row in results))


def bench_case(
    spec: KernelSpec,
    implementations: list[str],
    case: Case,
    about: dict[str, object],
    device: torch.device,
    copies: int,
) -> list[Row]:
    """Check ``implementations``, time the right ones and the peers, and return a row for each.

    Calls rotate over ``copies`` sets of inputs. ``error`` is the share of the allowed error, so a
    kernel above 1 is wrong and has no time. ``about`` has the machine's measured rates, of which
    ``roofline`` is a share.
    """
    torch.manual_seed(0)
    cost = spec.cost(case)
    inputs = spec.make_inputs(case, device)
    errors = {name: case_error(spec, name, case, inputs) for name in implementations}
    sets = [inputs, *(spec.make_inputs(case, device) for _ in range(copies - 1))]
    calls: dict[str, list[Call]] = {
        name: [_bound(spec.implementations[name], one) for one in sets]
        for name in implementations
        if errors[name] <= 1
    }
    peers: dict[str, list[Call]] = {}
    for one in sets:
        for name, call in prepared(spec.name, one).items():
            peers.setdefault(name, []).append(call)
    times = measure({**calls, **peers})
    best = min((name for name in peers), key=lambda name: times[name].ms, default=None)
    rows = []
    for name in (*implementations, *peers):
        row: Row = {
            "kernel": spec.name,
            "case": case.name,
            "impl": name,
            "error": errors.get(name, 0.0),
        }
        if name in times:
            row |= _figures(times[name], cost.bytes, cost.flops, about)
            if best is not None and name not in peers:
                row |= {
                    "peer": best,
                    "peer_ms": times[best].ms,
                    "speedup": times[best].ms / times[name].ms,
                }
        rows.append(row)
    return rows


def _bound(function: Callable[..., object], inputs: Inputs) -> Call:
    return lambda: function(**inputs)


def _figures(time: Time, moved: int, flops: int, about: dict[str, Any]) -> Row:
    tflops, gbps = flops / time.ms / 1e9, moved / time.ms / 1e6
    share = max(gbps / 1e3 / about["copy_TBps"], tflops / about["matmul_TFLOPs"])
    return {**asdict(time), "TFLOPs": tflops, "GBps": gbps, "roofline": share}


def _chosen(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[tuple[str, str], list[tuple[KernelSpec, str, Case]]]:
    chosen: dict[tuple[str, str], list[tuple[KernelSpec, str, Case]]] = {}
    for spec, implementation, case in rows("model"):
        if (not options.kernel or spec.name in options.kernel) and (
            not options.case or case.name in options.case
        ):
            chosen.setdefault((spec.name, case.name), []).append((spec, implementation, case))
    if not chosen:
        parser.error("no kernel has such a case")
    return chosen


def _base_rows(options: argparse.Namespace) -> dict[tuple[str, str, str], float]:
    """Time the same cases in a worktree of ``--base``.

    Returns:
        The milliseconds by operation, case and implementation.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "base.json"
        git = ["git", "-C", str(_ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), options.base], check=True)
        try:
            command = [sys.executable, "-m", "idefics2_bench.kernels", "--json", str(out)]
            for flag in ("kernel", "case"):
                for value in getattr(options, flag) or ():
                    command += [f"--{flag}", value]
            roots = os.pathsep.join(str(tree / root) for root in ("engine", "kernels", "bench"))
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": roots})
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        found = json.loads(out.read_text())["rows"]
    return {(row["kernel"], row["case"], row["impl"]): row["ms"] for row in found if "ms" in row}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idefics2 bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernel", action="append", help="only this operation; may be repeated")
    add("--case", action="append", help="only this case; may be repeated")
    add(
        "--mine",
        metavar="MODULE:FUNCTION",
        help="check a function of yours (FILE.py:FUNCTION works too) and time it beside --kernel",
    )
    add("--base", metavar="REF", help="time the same cases at this commit too")
    add("--json", type=Path, help="file to write the rows to; rows there of other cases are kept")
    add_report_option(parser)
    add("--commit", help="what to record as the commit, where there is no git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
