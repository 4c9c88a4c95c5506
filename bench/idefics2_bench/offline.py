"""Time many requests at once, from JPEG files to text: ``idefics2 bench offline``.

    idefics2 bench offline --requests 16 --shrink 8  # the demo checkpoint
    idefics2 bench offline --random-weights tests/data/idefics2-8b --json h200-offline.json
    idefics2 bench offline --workload mixed:1024,text,vqa --workload split --no-peer

Decoding is greedy. Every request gets exactly its number of tokens and continues after end tokens.
The engine runs ``LLM.iterate`` in rounds with different requests, so no cache has them. The row is
that of the round with the median time. It says where the seconds went: the parts of the engine's
thread, the device by kind of step, what was compiled, and what came from a cache.

``device_bound`` is the rate at which the device would do the useful work of the job alone. Its
rates are from rows of ``bench latency``: of a file (--rates), or timed after the jobs (--rates
measure, the default on a GPU). ``slow_host`` is what the job would take on a host with a slower
Python.

transformers generates in batches on the same weights, with prompts padded on the left. Each batch
runs as long as its longest answer. Batches are formed in the order of arrival, and also sorted by
the length of the answers, which a real server does not know. Sorted batches also run with compiled
decoding. Decode steps run without cuDNN's attention. The engine's threads also prepare the inputs
of transformers, with the same pixels. That time is included and also reported as ``prepare_ms``.
Rates count requested tokens only, without padding.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from idefics2_bench import latency, machine, model_suite, offline_peers, report, transformers_peer
from idefics2_bench.compilations import counted_compilations
from idefics2_bench.model_suite import LoadedModel
from idefics2_bench.offline_peers import Batches
from idefics2_bench.offline_workloads import (
    WORKLOADS,
    OfflineRequest,
    distinct_images,
    offline_counts,
    offline_name,
    offline_requests,
    tile_patches,
)
from idefics2_bench.slow_host import seconds_at_loop
from idefics2_bench.time_report import KINDS, time_figures, time_lines
from idefics2_bench.timing import synchronize
from idefics2_engine import LLM, SamplingParams, llm_options
from idefics2_engine.jobs.plan.device_rates import Rates, Work, bound_seconds
from idefics2_engine.jobs.plan.latency_case import latency_case
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.request_builder import RequestBuilder

Row = dict[str, Any]

# With so many images the worker processes start, which takes no time of a long job
_WARM_UP_REQUESTS = 64
_WARM_UP_SHRINK = 32
# The warm-up has other prompts and images, so that no cache contains the timed ones
_WARM_UP_SEED = 1
_SEEDS_PER_CASE = 1000
_RATE_STEPS = 40
_RATE_CASES = ("image-980-b8", "image-378x504-b16", "prefill-4096")
# Between few and all sequences a decode step's time is nearly a line
_RATE_BATCH = 32
_RATE_CONTEXT = 300
# A host that is slower than those that were met
_SLOW_LOOP = 1.2
_MEASURE, _NONE = "measure", "none"


@dataclass(frozen=True)
class Case:
    """One workload to time.

    Attributes:
        workload: Its name.
        count: Number of requests.
        shrink: Divisor of text and new tokens.
        processor: Splits images as the workload wants.
    """

    workload: str
    count: int
    shrink: int
    processor: Processor

    @property
    def name(self) -> str:
        """Name of the case in rows."""
        return offline_name(self.workload, self.count, self.shrink)

    def requests(self, seed: int = 0) -> list[OfflineRequest]:
        """Draw the requests of one round."""
        return offline_requests(self.workload, self.processor, self.count, seed, self.shrink)

    def warm_up(self) -> list[OfflineRequest]:
        """Draw a few short requests that are not timed."""
        count = min(_WARM_UP_REQUESTS, self.count)
        shrink = max(self.shrink, _WARM_UP_SHRINK)
        return offline_requests(self.workload, self.processor, count, _WARM_UP_SEED, shrink)


@dataclass(frozen=True)
class Job:
    """A timed round of a case: its row, and the useful work in it."""

    row: Row
    work: Work


class Results:
    """Rows that are printed and written as soon as they are known.

    Args:
        path: JSON file, if any.
        about: Description of the machine.
    """

    def __init__(self, path: Path | None, about: dict[str, object]) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._about = about

    def add(self, row: Row) -> None:
        """Add one row."""
        self.rows.append(row)
        print(report.whole_line(row), flush=True)
        self.write()

    def write(self) -> None:
        """Write all rows, after one has changed."""
        report.write_json(self._path, self._about, self.rows)

    def print_table(self, options: argparse.Namespace) -> None:
        """Print all rows as a table, and write them as a page if the options say so."""
        model_suite.print_table(options, self._about, self.rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    chosen = _chosen(options, parser)
    about = model_suite.about(options)
    about.setdefault("loop_seconds", round(machine.loop_seconds(), 3))
    free = _free_memory(options.device)
    is_split = any(WORKLOADS[name].is_split for name, _ in chosen)
    llm, start_seconds = _timed_start(options, is_split)
    cases = [
        Case(name, count, options.shrink, WORKLOADS[name].processor(llm.processor))
        for name, count in chosen
    ]
    settings = model_suite.settings_of(llm, options)
    heads = [
        {
            "kernel": "offline",
            "case": model_suite.case_name(case.name, options),
            **settings,
            "requests": case.count,
        }
        for case in cases
    ]
    impl = f"{options.ops}-share-prefix-reads" if options.share_prefix_reads else options.ops
    results = Results(options.json, about)
    jobs: list[Job] = []
    for index, (case, head) in enumerate(zip(cases, heads, strict=True)):
        # The caches hold nothing of a case with as many images and other seeds
        job = run_ours(llm, case, options.rounds, _SEEDS_PER_CASE * index)
        row = {**head, "impl": impl, **job.row, "loop_seconds": about["loop_seconds"]}
        row["slow_host"] = _slow_host(row)
        if not jobs:
            row["start_seconds"] = start_seconds + row["first_seconds"]
        if free is not None:
            row["taken_GB"] = (free - (_free_memory(options.device) or 0)) / 1e9
            row["beside_GB"] = row["taken_GB"] - row["kv_cache_GB"] - row["weights_GB"]
        jobs.append(Job(row, job.work))
        results.add(row)
        print(time_lines(row), flush=True)
    loaded = LoadedModel.of(llm)
    llm.close()
    rate_rows = options.rate_rows
    if options.rates == _MEASURE:
        rate_rows = _timed_rates(loaded, options)
        for row in rate_rows:
            results.add({**row, **settings})
    if rate_rows:
        rates = Rates.from_rows(rate_rows, loaded.processor.patch_size, options.quantization)
        for job in jobs:
            job.row["device_bound"] = _device_bound(job, rates)
            print(f"{report.whole_line(job.row)}\n{time_lines(job.row)}", flush=True)
        results.write()
    if options.peer is not None:
        peer = transformers_peer.transformers_model(loaded.model, model_suite.folder(options))
        for case, head, job in zip(cases, heads, jobs, strict=True):
            theirs: list[Row] = []
            for run in options.peer_runs:
                theirs.append({**head, **_run_theirs(peer, case, run, options.peer_batch)})
                _quote(job.row, theirs)
                results.add(theirs[-1])
    results.print_table(options)
    return 0


def run_ours(llm: LLM, case: Case, rounds: int, first_seed: int = 0) -> Job:
    """Answer the requests of ``case`` in ``rounds`` with other seeds; return the median round.

    The seeds are ``first_seed`` and later ones.

    Raises:
        RequestFailedError: The logits of a request are not finite.
    """
    warm_up = case.warm_up()
    with _processing(llm, case.processor):
        begin = time.perf_counter()
        _answer(llm, warm_up[:1])
        first = time.perf_counter() - begin
        _answer(llm, warm_up)
        jobs = []
        for turn in range(rounds):
            seed = turn if turn < _WARM_UP_SEED else turn + 1
            jobs.append(_one_round(llm, case, case.requests(first_seed + seed)))
    jobs.sort(key=lambda job: float(job.row["ms"]))
    median = jobs[(rounds - 1) // 2]
    times = {"rounds_ms": [job.row["ms"] for job in jobs], "first_seconds": first}
    return Job({**median.row, **times}, median.work)


def _one_round(llm: LLM, case: Case, requests: list[OfflineRequest]) -> Job:
    device, clock, hits = llm.model.device, llm.engine.clock, llm.images.files.hits
    counts = offline_counts(requests, case.processor)
    _reset_peak(device)
    with counted_compilations() as compilations:
        before, begin = clock.read(), time.perf_counter()
        _answer(llm, requests)
        synchronize(device)
        seconds, after = time.perf_counter() - begin, clock.read()
    row = {**asdict(counts), **_figures(seconds, case.count, device), **counts.rates(seconds)}
    if "peak_GB" in row:
        row["kv_cache_GB"] = llm.engine.runner.kv_cache.num_bytes / 1e9
        row["weights_GB"] = llm.model.num_bytes / 1e9
        row["other_GB"] = row["peak_GB"] - row["kv_cache_GB"] - row["weights_GB"]
    row |= time_figures(before, after, seconds)
    row["cached_files"] = llm.images.files.hits - hits
    row["compiled_kernels"] = compilations.kernels
    row["captured_graphs"] = compilations.graphs
    images = [tile_patches(size, case.processor) for size in distinct_images(requests)]
    work = Work(
        tiles=Counter(patches for image in images for patches in image),
        prompt_tokens=counts.image_tokens + counts.text_tokens - row["cached_tokens"],
        answers=Counter(request.max_tokens for request in requests),
        sequences=llm.engine_config.max_num_seqs,
    )
    return Job(row, work)


@contextmanager
def _processing(llm: LLM, processor: Processor) -> Iterator[None]:
    """Let ``llm`` split images as ``processor`` does."""
    builder, images = llm.request_builder, replace(llm.images, rules=processor.tile_rules)
    own = RequestBuilder(
        processor, llm.config, builder.generation, builder.max_model_len, 0, images
    )
    values = {"processor": processor, "images": images, "request_builder": own}
    with ExitStack() as patches:
        for name, value in values.items():
            patches.enter_context(patch.object(llm, name, value))
        yield


def _answer(llm: LLM, requests: Sequence[OfflineRequest]) -> None:
    """Answer ``requests``; raise if one fails or does not get its number of tokens."""
    rows = [
        (
            request.prompt(),
            SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True),
        )
        for request in requests
    ]
    for output in llm.iterate(rows):
        if output.error is not None:
            raise output.error
        wanted, got = requests[int(output.request_id)].max_tokens, output.outputs[0].token_ids
        if len(got) != wanted:
            raise RuntimeError(
                f"request {output.request_id}: {wanted} tokens wanted, got {len(got)}"
            )


def _run_theirs(peer: Any, case: Case, run: str, size: int) -> Row:
    """Answer the requests of the first round with transformers, in batches of ``size``."""
    requests = case.requests()
    row: Row = {"impl": offline_peers.RUNS[run]}
    counts = offline_counts(requests, case.processor)
    if run != "arrival":
        requests = sorted(requests, key=lambda request: request.max_tokens)
    pad_id = case.processor.tokenizer.pad_id or 0
    generate: offline_peers.Generate = offline_peers.EagerGeneration(peer, pad_id)
    batches = Batches(case.processor, requests, size, is_filled=run == "compiled")
    warm_up = case.warm_up()
    try:
        if run == "compiled":
            generate, facts = offline_peers.compiled_generation(peer, batches, warm_up)
            row |= facts
        else:
            offline_peers.run_batches(peer, generate, Batches(case.processor, warm_up, size))
        if peer.device.type == "cuda":
            torch.cuda.empty_cache()
        _reset_peak(peer.device)
        begin = time.perf_counter()
        prepare = offline_peers.run_batches(peer, generate, batches)
        seconds = time.perf_counter() - begin
    except Exception as error:
        if run != "compiled":
            raise
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"}
    row |= {**asdict(counts), **_figures(seconds, case.count, peer.device)}
    return {**row, **counts.rates(seconds), "prepare_ms": 1e3 * prepare}


def _quote(row: Row, theirs: list[Row]) -> None:
    """Put the peer's fastest run into our row."""
    timed = [one for one in theirs if "ms" in one]
    if timed:
        best = min(timed, key=lambda one: float(one["ms"]))
        row |= {
            "peer": best["impl"],
            "peer_ms": best["ms"],
            "speedup": best["ms"] / row["ms"],
        }


def _slow_host(row: Row) -> Row:
    device = {kind: row["device_seconds"][kind] for kind in KINDS}
    seconds = seconds_at_loop(
        row["ms"] / 1e3, device, row["thread_cpu_seconds"], row["loop_seconds"], _SLOW_LOOP
    )
    return {
        "loop_seconds": _SLOW_LOOP,
        "seconds": seconds,
        "requests_per_second": row["requests"] / seconds,
    }


def _device_bound(job: Job, rates: Rates) -> Row:
    row, seconds = job.row, bound_seconds(job.work, rates)
    padded = row["padded_tokens"] * rates.token + row["padded_patches"] * rates.patch
    busy = sum(row["device_seconds"][kind] for kind in KINDS)
    return {
        "requests_per_second": row["requests"] / sum(seconds.values()),
        "seconds": seconds,
        "padded_seconds": padded,
        "padded_share": padded / busy if busy else 0.0,
        "formula": str(rates),
    }


def _timed_rates(loaded: LoadedModel, options: argparse.Namespace) -> list[Row]:
    """Time cases of ``bench latency``; return the engine's rows."""
    batches = sorted({min(_RATE_BATCH, options.max_num_seqs), options.max_num_seqs})
    steps = [f"decode-b{batch}-s{_RATE_CONTEXT}" for batch in batches]
    return [
        {**row, "case": model_suite.case_name(name, options)}
        for name in (*_RATE_CASES, *steps)
        for row in latency.bench_case(latency_case(name), loaded, {}, options.ops, _RATE_STEPS)
    ]


def _timed_start(options: argparse.Namespace, is_split: bool) -> tuple[LLM, float]:
    """Return the ``LLM``, and the seconds that making it took beside loading the weights.

    If ``is_split``, it has room for split images. Each workload splits its images or not.
    """
    loading: list[float] = []

    def load_model(*arguments: Any) -> Any:
        begin = time.perf_counter()
        model = llm_options.load_model(*arguments)
        synchronize(model.device)
        loading.append(time.perf_counter() - begin)
        return model

    begin = time.perf_counter()
    with patch("idefics2_engine.llm.load_model", load_model):
        llm = model_suite.load(
            options,
            split_images=is_split,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_tokens=options.kv_cache_tokens,
            share_prefix_reads=options.share_prefix_reads,
        )
    return llm, time.perf_counter() - begin - sum(loading)


def _free_memory(device: str) -> int | None:
    """Return the bytes that are free on a CUDA device, for all processes."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.mem_get_info(torch.device(device))[0]


def _reset_peak(device: torch.device) -> None:
    # The allocator keeps its memory, as in a long job
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _figures(seconds: float, requests: int, device: torch.device) -> Row:
    row: Row = {"ms": 1e3 * seconds, "requests_per_s": requests / seconds}
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[tuple[str, int]]:
    """Check the options and return the workloads with their numbers of requests."""
    for name in ("requests", "shrink", "peer_batch", "rounds"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    if options.rates is None:
        options.rates = _MEASURE if options.device.startswith("cuda") else _NONE
    options.rate_rows = []
    if options.rates not in (_MEASURE, _NONE):
        try:
            options.rate_rows = json.loads(Path(options.rates).read_text(encoding="utf-8"))["rows"]
            # Rows that lack a kind of work are refused before anything runs
            Rates.from_rows(options.rate_rows, 14, options.quantization)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--rates must be a file of bench latency, got {options.rates}: {error}")
    if options.peer_runs is None:
        options.peer_runs = ["arrival", "sorted"]
        options.peer_runs += ["compiled"] * options.device.startswith("cuda")
    else:
        options.peer_runs = options.peer_runs.split(",")
        for run in options.peer_runs:
            if run not in offline_peers.RUNS:
                parser.error(
                    f"--peer-runs must be some of {', '.join(offline_peers.RUNS)}, got {run!r}"
                )
    chosen = []
    for item in ",".join(options.workload or ["mixed"]).split(","):
        name, colon, count = item.partition(":")
        if name not in WORKLOADS:
            parser.error(f"--workload must be some of {', '.join(WORKLOADS)}, got {name!r}")
        if colon and not (count.isascii() and count.isdigit() and int(count)):
            parser.error(f"--workload {name}: requests must be at least 1, got {count!r}")
        chosen.append((name, int(count) if colon else options.requests or WORKLOADS[name].count))
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("offline", __doc__)
    add = parser.add_argument
    counts = ", ".join(f"{name} {workload.count}" for name, workload in WORKLOADS.items())
    add(
        "--workload",
        action="append",
        metavar="NAME[:N],...",
        help="mixed (the default), text, vqa, shared or split, each with its number of requests "
        "if it differs from --requests; may be repeated",
    )
    add("--requests", type=int, help=f"how many of each workload (default: {counts})")
    add(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide text tokens and new tokens by N, for a small machine or model",
    )
    add(
        "--rounds",
        type=int,
        default=3,
        help="rounds of the engine, whose median is kept (default: %(default)s)",
    )
    add(
        "--rates",
        metavar="FILE",
        help="rows of bench latency for the device-bound rate; measure times them after the jobs "
        "(default on a GPU), none leaves it out (default on a CPU)",
    )
    add("--max-num-seqs", type=int, default=256, help="as LLM's (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, default=8192, help="as LLM's (default: %(default)s)")
    add("--kv-cache-tokens", type=int, help="as LLM's")
    add("--max-model-len", type=int, help="as LLM's")
    add("--share-prefix-reads", action="store_true", help="as LLM's")
    add("--peer-batch", type=int, default=64, help="transformers' batches (default: %(default)s)")
    add(
        "--peer-runs",
        metavar="RUN,...",
        help="arrival, sorted, compiled (default: all on a GPU, the first two on a CPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
