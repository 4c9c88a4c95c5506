"""Divide steps of a model by operation, each beside its floor: ``idefics2 bench steps``.

    idefics2 bench steps  # the demo checkpoint
    idefics2 bench steps --random-weights tests/data/idefics2-8b --json h200-steps.json
    idefics2 bench steps --case decode-b32 --case prefill-4096 --report steps.html

A step is timed as one CUDA graph, without a trace. It is then traced, launched kernel by kernel and
as a graph, and each kernel of the graph gets the operation that launched its partner. On a CPU the
operations are timed by the clock.

A floor is the longer of two times: moving the bytes of a call at the bandwidth of a copy, and
computing its FLOP at the rate of a large product. Both are measured in the same run.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from idefics2_bench import machine, model_suite, report
from idefics2_bench.results.page import write_report
from idefics2_bench.steps.division import divide
from idefics2_bench.steps.model_steps import model_step
from idefics2_bench.steps.operation_calls import WatchedOps
from idefics2_bench.steps.parts import KERNEL, WHOLE
from idefics2_bench.steps.step_rows import Row, rows_of, table
from idefics2_bench.timing import Time, alternate, measure
from idefics2_bench.workloads import Counts, misfit
from idefics2_engine.jobs.plan.latency_case import LatencyCase, latency_case
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_kernels import REFERENCE, TRITON

STEP_CASES = (
    "decode-b1",
    "decode-b32",
    "decode-b128",
    "decode-b256",
    "prefill-4096",
    "image-mixed-b16",
    "image-980-b8",
)
_ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 1 if a result was not finite, else 0.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    try:
        cases = [latency_case(name) for name in options.case or STEP_CASES]
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device.startswith("cuda") and options.ops == "reference":
        parser.error("--ops on a GPU must be triton, whose steps can be captured, got reference")
    about = model_suite.about(options)
    if "copy_TBps" not in about:
        about |= machine.cpu_ceilings()
    watched = WatchedOps(TRITON if options.ops == "triton" else REFERENCE)
    model = model_suite.load_network(options, watched.ops)
    fitting = []
    for case in cases:
        if (problem := misfit(case, model.config)) is None:
            fitting.append(case)
        elif options.case:
            parser.error(problem)
        else:
            print(f"{problem}: left out", file=sys.stderr)
    settings = model_suite.network_settings(model, options)
    results: list[Row] = []
    with torch.inference_mode():
        # A profiler may slow down what runs after it, so all steps are timed before the first trace
        times = {}
        for case in fitting:
            _free(model)
            times[case.name] = _timed(case, model, options.rounds)
        for case in fitting:
            _free(model)
            head = {"kernel": KERNEL, "case": model_suite.case_name(case.name, options)}
            head |= {"impl": options.ops}
            for row in bench_case(case, model, watched, times[case.name], about, options.rounds):
                results.append({**head, **row, **settings})
            report.write_json(options.json, about, results)
    name = about["gpu"] or about["cpu"]
    print(
        f"{name}, torch {about['torch']}, Triton {about['triton']}, commit {about['commit']}, "
        f"{about['date']}; copy {about['copy_TBps']} TB/s, product {about['matmul_TFLOPs']} TFLOP/s"
        f"\n\n{table(results)}"
    )
    write_report(options.report, about, results)
    return int(any("ms" not in row for row in results))


def bench_case(
    case: LatencyCase,
    model: Idefics2,
    watched: WatchedOps,
    whole: Time | None,
    ceilings: dict[str, Any],
    rounds: int,
) -> list[Row]:
    """Return the rows of ``case``, of which the first has the counts of its work.

    A step whose result is not finite has no time in its row, and no parts.
    """
    counts = Counts.of(case, model.config)
    work: Row = {"batch": case.batch, "context": case.length if case.kernel == "step" else 0}
    work |= asdict(counts)
    if whole is None:
        return [{"operation": WHOLE, **work}]
    step = model_step(case, model)
    calls = watched.calls_of(step)
    division = divide(step, watched, calls, rounds, model.device)
    first, *parts = rows_of(calls, whole, division, ceilings)
    return [{**first, **work, **counts.rates(whole.ms / 1e3)}, *parts]


def _timed(case: LatencyCase, model: Idefics2, rounds: int) -> Time | None:
    """Time the step of ``case``; return ``None`` if its result is not finite."""
    step = model_step(case, model)
    if not step().isfinite().all():
        return None
    if model.device.type != "cuda":
        return alternate({KERNEL: step}, rounds, 1, model.device)[KERNEL]
    return measure({KERNEL: [step]})[KERNEL]


def _free(model: Idefics2) -> None:
    """Free the KV cache and the graph of the case before."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("steps", __doc__, has_peer=False)
    add = parser.add_argument
    add("--case", action="append", help="only this case, as in the examples; may be repeated")
    add("--rounds", type=int, default=_ROUNDS, help="traced rounds (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
