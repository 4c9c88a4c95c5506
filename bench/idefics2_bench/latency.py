"""Time decode steps, images and prefill of a whole model: ``idefics2 bench latency``.

    idefics2 bench latency  # the demo checkpoint
    idefics2 bench latency --random-weights tests/data/idefics2-8b --json h200-latency.json
    idefics2 bench latency --case decode-b4-s64 --case image-112-b2 --case prefill-64

A step is one ``Engine.step``: scheduling, the forward pass, sampling, and the copy of tokens to the
host. Its time is the mean of eight steps in a row, because the engine runs ahead of the device.
Prefill is one step of a whole prompt. Images are timed from pixels on the device to embeddings, all
images of a case together.

transformers alternates with the engine in the same process, on the same weights, in the same dtype,
with SDPA attention (without cuDNN in decode steps). Its time is that of the forward pass and the
choice of the most likely token, without the rest of ``generate``. It runs twice: eagerly with a
``DynamicCache``, and compiled (``--peer-compile``, the default on a GPU) with a static cache and
CUDA graphs in decode steps. Prefill is not compiled. The engine's row quotes the faster one.
Compiling takes one or two minutes per case and is not timed.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from idefics2_bench import model_suite, report, transformers_peer
from idefics2_bench.latency_peers import COMPILED_PEER, CONTENDERS
from idefics2_bench.model_suite import Loaded
from idefics2_bench.timing import alternate
from idefics2_bench.workloads import STEPS_IN_A_ROW, Counts, misfit, text_tokens, tiles
from idefics2_engine import SamplingParams
from idefics2_engine.jobs.plan.latency_case import LATENCY_CASES, LatencyCase, latency_case
from idefics2_engine.model.batch import ImageBatch
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.scheduling.sequence import Request

Row = dict[str, Any]

_STEPS = 80
# Most rounds of images and prefill, which take longer than a decode step
_MOST_ROUNDS = 10
_WARM_UP = 3


class Contender(Protocol):
    """One implementation of a case."""

    def first(self) -> Tensor:
        """Prepare the calls and return a result (rows, values) to check and compare."""

    def __call__(self) -> object:
        """Run once what is timed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line.

    Returns:
        The exit code: 1 if a result was not finite, else 0.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    if options.peer_compile and options.peer is None:
        parser.error("--peer-compile: must come with a peer, of which there is none")
    if options.peer_compile is None:
        options.peer_compile = options.peer is not None and options.device.startswith("cuda")
    try:
        cases = [latency_case(name) for name in options.case or LATENCY_CASES]
    except ValueError as error:
        parser.error(str(error))
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    about = model_suite.about(options)
    # Only the model of ``llm`` is used. Each case builds an engine of the size that it needs.
    llm = model_suite.load(
        options, max_model_len=PAGE_SIZE, max_num_seqs=1, kv_cache_tokens=PAGE_SIZE
    )
    settings = model_suite.settings_of(llm, options) | model_suite.memory_of(llm)
    # The compiled peer is a second model on the same weights, so the other one stays eager
    names = ([options.peer] if options.peer else []) + [COMPILED_PEER] * options.peer_compile
    folder = model_suite.folder(options)
    peers = {name: transformers_peer.transformers_model(llm.model, folder) for name in names}
    results: list[Row] = []
    for case in cases:
        if (problem := misfit(case, llm.config, _new_tokens(case, options.steps))) is not None:
            if options.case:
                parser.error(problem)
            print(f"{problem}: left out", file=sys.stderr)
            continue
        for row in bench_case(case, llm, peers, options.ops, options.steps):
            row["case"] = model_suite.case_name(case.name, options)
            results.append({**row, **settings})
            print(report.whole_line(row), flush=True)
        report.write_json(options.json, about, results)
    model_suite.print_table(options, about, results)
    return int(any("ms" not in row and "error" not in row for row in results))


def _rounds(case: LatencyCase, steps: int) -> int:
    """Return the number of timed calls of ``case`` for the option ``steps``."""
    return -(-steps // STEPS_IN_A_ROW) if case.kernel == "step" else min(steps, _MOST_ROUNDS)


def _new_tokens(case: LatencyCase, steps: int) -> int:
    """Return the new tokens of a sequence of ``case`` for the option ``steps``."""
    return _most_new_tokens(_rounds(case, steps)) if case.kernel == "step" else 1


def _most_new_tokens(rounds: int) -> int:
    """Return the new tokens of a sequence in ``rounds``, with the first two and the warm-up."""
    return 2 + (rounds + _WARM_UP) * STEPS_IN_A_ROW


def bench_case(
    case: LatencyCase, llm: Loaded, peers: Mapping[str, Any], ops_name: str, steps: int
) -> list[Row]:
    """Check and time ``case`` on our model and on each of ``peers``, and return a row for each.

    The peers are transformers' models by their names in ``CONTENDERS``. A result that is not finite
    has no time in its row. If the compiled peer fails, its row has an ``error`` instead of a time.
    """
    # The caches and graphs of the case before are freed here and not inside a timed call
    gc.collect()
    torch.compiler.reset()
    if llm.model.device.type == "cuda":
        torch.cuda.empty_cache()
    rounds = _rounds(case, steps)
    ours = _OURS[case.kernel](case, llm, rounds)
    contenders: dict[str, Contender] = {ops_name: ours}
    firsts: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    with torch.inference_mode():
        firsts[ops_name] = ours.first().float()
        for name, peer in peers.items():
            if case.kernel not in CONTENDERS[name]:
                continue
            try:
                if name == COMPILED_PEER:
                    print(f"{case.name}: transformers is being compiled", file=sys.stderr)
                contenders[name] = CONTENDERS[name][case.kernel](case, llm, peer, ours)
                firsts[name] = contenders[name].first().float()
            except Exception as error:
                if name != COMPILED_PEER:
                    raise
                contenders.pop(name, None)
                errors[name] = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        calls: dict[str, Callable[[], object]] = {
            name: contenders[name] for name, first in firsts.items() if first.isfinite().all()
        }
        times = alternate(calls, rounds, _WARM_UP, llm.model.device)
    if case.kernel == "step":
        times = {name: time.shared_by(STEPS_IN_A_ROW) for name, time in times.items()}
    counts = Counts.of(case, llm.config)
    rows = []
    for name in (*contenders, *errors):
        row: Row = {"kernel": case.kernel, "case": case.name, "impl": name}
        row |= {"batch": case.batch, "context": case.length if case.kernel == "step" else 0}
        row |= asdict(counts)
        if name in errors:
            row["error"] = errors[name]
        if name in times:
            row |= {**asdict(times[name]), **counts.rates(times[name].ms / 1e3)}
        if name != ops_name and {name, ops_name} <= times.keys():
            row["difference"] = _difference(firsts[ops_name], firsts[name])
        row |= getattr(contenders.get(name), "facts", {})
        rows.append(row)
    timed = [row for row in rows[1:] if "difference" in row]
    if timed:
        best = min(timed, key=lambda row: float(row["ms"]))
        rows[0] |= {
            "peer": best["impl"],
            "peer_ms": best["ms"],
            "speedup": best["ms"] / rows[0]["ms"],
            "peer_difference": best["difference"],
        }
    return rows


class EngineCalls:
    """An engine of the size that a case needs, and its requests."""

    def __init__(self, case: LatencyCase, llm: Loaded, new_tokens: int) -> None:
        tokenizer = llm.processor.tokenizer
        never = ((tokenizer.fake_image_id,), (tokenizer.image_id,))
        length = case.length + new_tokens
        # The scheduler keeps one page free for each running sequence
        pages = -(-length // PAGE_SIZE) + 1
        self.engine = Engine(
            llm.model,
            tokenizer,
            llm.processor.image_config,
            GenerationConfig(frozenset(), never),
            EngineConfig(
                max_model_len=length,
                max_num_seqs=case.batch,
                kv_cache_tokens=case.batch * pages * PAGE_SIZE,
                # All prompts fit in one step
                max_num_batched_tokens=case.batch * case.length,
                # No image is encoded, so the fewest graphs are captured for images
                max_patches=1,
                max_cached_images=1,
                prefix_caching=False,
                cuda_graphs=llm.engine_config.cuda_graphs,
                run_ahead=llm.engine_config.run_ahead and case.kernel == "step",
            ),
        )
        self.case = case
        self.new_tokens = new_tokens
        random = np.random.default_rng(0)
        self.prompts = [text_tokens(tokenizer, case.length, random) for _ in range(case.batch)]
        # The requests that are not finished
        self.requests: list[Request] = []

    def add(self, prompt: list[int]) -> Request:
        """Queue a request that continues ``prompt`` greedily by ``new_tokens`` tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True)
        request = Request("", "", prompt, [], params, seed=0, max_tokens=self.new_tokens)
        self.engine.add(request)
        self.requests = [one for one in (*self.requests, request) if not one.finished]
        return request

    def step(self) -> None:
        """Run one step.

        Raises:
            RuntimeError: A sequence of the case got no token.
        """
        before = self.engine.stats.generated_tokens
        self.engine.step()
        drawn = self.engine.stats.generated_tokens - before
        if drawn != self.case.batch:
            raise RuntimeError(
                f"{self.case.name}: {drawn} of {self.case.batch} sequences got a token"
            ) from next((one.error for one in self.requests if one.error is not None), None)


class OurSteps(EngineCalls):
    """Decode steps."""

    def __init__(self, case: LatencyCase, llm: Loaded, rounds: int) -> None:
        super().__init__(case, llm, _most_new_tokens(rounds))
        self.first_tokens: list[int] = []

    def first(self) -> Tensor:
        """Compute the prompts and a decode step; return the last logits (B, V).

        If no prompt has finite logits, the decode step may not run. The prompts' logits are then
        returned.
        """
        requests = [self.add(prompt) for prompt in self.prompts]
        with model_suite.watched_logits(self.engine) as seen:
            while len(seen) < 2 and self.engine.has_work:
                self.engine.step()
        drawn = [request.sequences[0].token_ids[self.case.length :] for request in requests]
        self.first_tokens = [tokens[0] if tokens else 0 for tokens in drawn]
        return seen[-1]

    def __call__(self) -> None:
        """Run the next ``STEPS_IN_A_ROW`` decode steps."""
        for _ in range(STEPS_IN_A_ROW):
            self.step()


class OurPrefill(EngineCalls):
    """A prompt in one step."""

    def __init__(self, case: LatencyCase, llm: Loaded, rounds: int) -> None:
        super().__init__(case, llm, new_tokens=1)

    def first(self) -> Tensor:
        """Compute the prompt; return its last logits (1, V), which need not be finite."""
        self.add(self.prompts[0])
        with model_suite.watched_logits(self.engine) as seen:
            self.engine.step()
        return seen[0]

    def __call__(self) -> None:
        """Compute the prompt again, without a prefix cache."""
        self.add(self.prompts[0])
        self.step()


class OurImages:
    """All images in one packed pass."""

    def __init__(self, case: LatencyCase, llm: Loaded, rounds: int) -> None:
        vision = llm.config.vision
        self.tiles = tiles(case, vision.patch_size, vision.grid)
        self.model = llm.model
        batch = ImageBatch.from_tiles(self.tiles, llm.processor.image_config)
        self.batch = batch.to(llm.model.device)

    def first(self) -> Tensor:
        """Return the embeddings of all images (rows, values)."""
        return self().flatten(0, -2)

    def __call__(self) -> Tensor:
        """Encode the images."""
        return self.model.image_features(self.batch)


_OURS: dict[str, Callable[..., Contender]] = {
    "step": OurSteps,
    "prefill": OurPrefill,
    "image": OurImages,
}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value of ``theirs``."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("latency", __doc__)
    parser.add_argument(
        "--case", action="append", help="only this case, as in the examples; may be repeated"
    )
    parser.add_argument(
        "--steps", type=int, default=_STEPS, help="timed decode steps (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-compile",
        action=argparse.BooleanOptionalAction,
        help="time transformers compiled as well, a minute or two a case (default: on a GPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
