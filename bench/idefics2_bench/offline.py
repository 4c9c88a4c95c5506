"""Time many requests at once, from JPEG files to text: ``idefics2 bench offline``.

    idefics2 bench offline --requests 16 --shrink 8  # the demo checkpoint
    idefics2 bench offline --random-weights tests/data/idefics2-8b --json h200-offline.json

Decoding is greedy. Every request gets exactly its number of tokens and continues after end tokens.
The engine runs ``LLM.iterate``. transformers generates in batches on the same weights, with prompts
padded on the left. Each batch runs as long as its longest answer. Batches are formed in the order
of arrival, and also sorted by the length of the answers, which a real server does not know. The
engine's threads also prepare the inputs of transformers, with the same pixels. That time is
included and also reported as ``prepare_ms``. Rates count requested tokens only, without padding.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from idefics2_bench import model_suite, report, transformers_peer
from idefics2_bench.timing import synchronize
from idefics2_bench.workloads import (
    OFFLINE_REQUESTS,
    Counts,
    OfflineRequest,
    offline_counts,
    offline_name,
    offline_requests,
)
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.prompts.processor import Processor

Row = dict[str, Any]

_WARM_UP_REQUESTS = 16
_WARM_UP_SHRINK = 32
# The warm-up has other prompts and images, so that no cache contains the timed ones
_WARM_UP_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    for name in ("requests", "shrink", "peer_batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    about = model_suite.about(options)
    llm = model_suite.load(
        options,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_tokens=options.kv_cache_tokens,
    )
    processor, config_folder = llm.processor, model_suite.folder(options)
    requests = offline_requests(processor, options.requests, shrink=options.shrink)
    warm_up = offline_requests(
        processor, min(_WARM_UP_REQUESTS, options.requests), _WARM_UP_SEED, _WARM_UP_SHRINK
    )
    counts = offline_counts(requests, processor)
    name = model_suite.case_name(offline_name(options.requests, options.shrink), options)
    head: Row = {"kernel": "offline", "case": name}
    head |= {**model_suite.settings_of(llm, options), "requests": len(requests), **asdict(counts)}
    ours = run_ours(llm, requests, warm_up, counts)
    rows = [{**head, "impl": options.ops, **ours}]
    print(report.whole_line(rows[0]), flush=True)
    report.write_json(options.json, about, rows)
    model = llm.model
    # The KV cache is freed, so that transformers can use its memory
    del llm
    gc.collect()
    if options.peer is not None:
        peer = transformers_peer.transformers_model(model, config_folder)
        size = options.peer_batch
        _run_batches(peer, processor, warm_up, size)
        for order in ("arrival", "sorted"):
            figures = run_theirs(peer, processor, requests, size, order, counts)
            rows.append({**head, "impl": f"{model_suite.PEER}-{order}", **figures})
            print(report.whole_line(rows[-1]), flush=True)
            report.write_json(options.json, about, rows)
        best = min(rows[1:], key=lambda row: row["ms"])
        rows[0] |= {
            "peer": best["impl"],
            "peer_ms": best["ms"],
            "speedup": best["ms"] / rows[0]["ms"],
        }
    report.write_json(options.json, about, rows)
    model_suite.print_table(about, rows)
    return 0


def run_ours(
    llm: LLM, requests: list[OfflineRequest], warm_up: list[OfflineRequest], counts: Counts
) -> Row:
    """Answer ``warm_up``, then time the answers to ``requests`` and return their figures.

    Raises:
        Exception: The error of a request that failed, for example for logits that are not finite.
        RuntimeError: A request did not get its number of tokens.
    """
    device = llm.model.device
    _answer(llm, warm_up)
    _start_memory(device)
    begin = time.perf_counter()
    _answer(llm, requests)
    synchronize(device)
    row = _figures(time.perf_counter() - begin, counts, len(requests), device)
    if "peak_GB" in row:
        row["kv_cache_GB"] = llm.engine.runner.kv_cache.num_bytes / 1e9
        row["weights_GB"] = llm.model.num_bytes / 1e9
        row["other_GB"] = row["peak_GB"] - row["kv_cache_GB"] - row["weights_GB"]
    return row


def run_theirs(
    peer: Any,
    processor: Processor,
    requests: list[OfflineRequest],
    batch: int,
    order: str,
    counts: Counts,
) -> Row:
    """Time transformers' answers to ``requests`` and return their figures.

    Batches have ``batch`` requests. ``order`` is "arrival", or "sorted" by the answers' length.
    """
    if order == "sorted":
        requests = sorted(requests, key=lambda request: request.max_tokens)
    _start_memory(peer.device)
    begin = time.perf_counter()
    prepare = _run_batches(peer, processor, requests, batch)
    seconds = time.perf_counter() - begin
    return {**_figures(seconds, counts, len(requests), peer.device), "prepare_ms": 1e3 * prepare}


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


def _run_batches(
    peer: Any, processor: Processor, requests: Sequence[OfflineRequest], size: int
) -> float:
    """Generate in batches of ``size``; return the seconds spent on preparing prompts and images."""
    reading = 0.0
    pad_id = processor.tokenizer.pad_id or 0
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        begin = time.perf_counter()
        prompts = processor.finish(
            [processor.draft_token_prompt(one.prompt_token_ids, one.images) for one in batch]
        )
        reading += time.perf_counter() - begin
        longest = max(request.max_tokens for request in batch)
        tokens = transformers_peer.generate(
            peer, prompts, processor.image_config, pad_id, longest
        ).tolist()
        assert len(tokens) == len(batch)
    return reading


def _start_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _figures(seconds: float, counts: Counts, requests: int, device: torch.device) -> Row:
    row: Row = {"ms": 1e3 * seconds, "requests_per_s": requests / seconds, **counts.rates(seconds)}
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("offline", __doc__)
    add = parser.add_argument
    add(
        "--requests",
        type=int,
        default=OFFLINE_REQUESTS,
        help="how many, the first of the workload (default: %(default)s)",
    )
    add(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide text tokens and new tokens by N, for a small machine or model",
    )
    add("--max-num-seqs", type=int, default=256, help="as LLM's (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, default=8192, help="as LLM's (default: %(default)s)")
    add("--kv-cache-tokens", type=int, help="as LLM's")
    add("--max-model-len", type=int, help="as LLM's")
    add("--peer-batch", type=int, default=64, help="transformers' batches (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
