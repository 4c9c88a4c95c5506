"""The runtime gives the same tokens however it divides the work.

Tests vary batches, chunks, preemption, prefix caching, windows and the number of slots.
"""

import gc
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_stand_in import PADDED_REFERENCE, StandInGraph, StandInPool
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError, RequestFailedError
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.sampling.sampler import Drawn
from idefics2_engine.scheduling.sequence import Request
from oracle import random_image
from tiny_checkpoint import write_checkpoint

WINDOW, PAGE = 24, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, window=WINDOW)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", False, False), id="cpu"),
        pytest.param(("cpu", True, False), id="ahead"),
        pytest.param(("cpu", True, True), id="graphs"),
        pytest.param(("cuda", True, True), id="kernels", marks=pytest.mark.gpu),
    ],
)
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Load the model in fp32.

    On a CPU it uses the reference's operations, on a GPU kernels and graphs. "graphs" pads steps
    like graphs on the CPU.
    """
    device, run_ahead, has_graphs = request.param
    llm = LLM(
        folder,
        device=device,
        dtype="float32",
        max_model_len=200,
        kv_cache_tokens=208,
        ops=PADDED_REFERENCE if device == "cpu" else None,
    )
    llm.engine_config = replace(llm.engine_config, run_ahead=run_ahead, cuda_graphs=has_graphs)
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr("idefics2_engine.runtime.model_runner.GraphPool", StandInPool)
        yield llm


@pytest.fixture(scope="module")
def exact(folder: Path) -> LLM:
    """Load the same model in float64."""
    return LLM(folder, device="cpu", dtype=torch.float64, max_model_len=200)


def make_engine(llm: LLM, **sizes: Any) -> Engine:
    """Build an engine on the model of ``llm`` with given sizes; its cache starts full of NaN."""
    config = EngineConfig(
        **{
            "max_model_len": 200,
            "max_num_seqs": 64,
            "kv_cache_tokens": 4096,
            "max_cached_images": 16,
            # Few graphs
            "max_num_batched_tokens": 1024,
            "max_patches": 4900,
            "page_size": PAGE,
            "run_ahead": llm.engine_config.run_ahead,
            "cuda_graphs": llm.engine_config.cuda_graphs,
            **sizes,
        }
    )
    old = llm.engine
    engine = Engine(
        llm.model,
        old.tokenizer,
        llm.processor.image_config,
        old.generation,
        config,
    )
    for layer in engine.runner.kv_cache.layers:
        for tensor in layer:
            tensor.fill_(float("nan"))
    engine.runner.image_features.fill_(float("nan"))
    return engine


def make_requests(llm: LLM) -> list[Request]:
    """Build requests of unequal length.

    They mix greedy and sampled requests, several answers, repeated images and common prefixes.
    """
    requests = []
    pictures = [random_image(60 + 30 * i, 140 - 20 * i, seed=i) for i in range(4)]
    for i in range(14):
        images = [pictures[(i + j) % 4] for j in range(i % 4)]
        words = "the chicken sits on a pile of money and looks at what is left of the red car"
        text = "A common beginning that fills a page or two. " * (i % 2) + words[: 3 + 5 * i]
        prompt = {"prompt": "<image>" * len(images) + text, "multi_modal_data": {"image": images}}
        (processed,) = llm.processor.finish([llm.request_builder.read_prompt(prompt)])
        params = SamplingParams(
            temperature=[0.0, 0.9][i % 2],
            top_p=0.95,
            seed=i,
            n=1 + 2 * (i % 5 == 4),
            max_tokens=6 + 3 * (i % 3),
            min_tokens=2,
            logprobs=0,
            prompt_logprobs=0 if i % 4 == 3 else None,
            prompt_logprobs_start=i if i % 8 == 7 else 0,
        )
        requests.append(llm.request_builder.build(processed, params))
    return requests


def answers(
    engine: Engine, requests: list[Request], between: Callable[[int], None] = lambda _: None
) -> list[list[list[int]]]:
    """Run ``requests`` to completion, with ``between`` before each step; return their tokens."""
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        between(steps)
        engine.step()
        engine.scheduler.check_integrity()
        steps += 1
    return [[output.token_ids for output in request.output().outputs] for request in requests]


def log_probabilities(requests: list[Request]) -> torch.Tensor:
    """Return the log probabilities of all scored tokens, of prompts and of answers."""
    values = []
    for request in requests:
        output = request.output()
        scored = list(zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False))[1:]
        for answer in output.outputs:
            scored += zip(answer.token_ids, answer.logprobs or [], strict=True)
        values += [of_place[token].logprob for token, of_place in scored if of_place]
    return torch.tensor(values, dtype=torch.float64)


def run_one_by_one(llm: LLM) -> tuple[list[list[list[int]]], torch.Tensor]:
    """Return the answers of requests run one after another, and their log probabilities.

    Each has an empty cache.
    """
    requests = make_requests(llm)
    tokens = [answers(make_engine(llm), [request])[0] for request in requests]
    return tokens, log_probabilities(requests)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> tuple[list[list[list[int]]], torch.Tensor]:
    return run_one_by_one(llm)


@pytest.fixture(scope="module")
def exact_scores(exact: LLM) -> torch.Tensor:
    return run_one_by_one(exact)[1]


@pytest.fixture(scope="module")
def one_by_one(
    alone: tuple[list[list[list[int]]], torch.Tensor], exact_scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probabilities of requests run one after another, in fp32 and in float64."""
    return alone[1], exact_scores


def assert_scores(requests: list[Request], one_by_one: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Check log probabilities: their error may be twice that of requests run one after another."""
    single, exact = one_by_one
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * ((single - exact).abs().max() + eps * exact.abs().max())
    assert (log_probabilities(requests) - exact).abs().max() <= allowed


@pytest.fixture(scope="module")
def expected(alone: tuple[list[list[list[int]]], torch.Tensor]) -> list[list[list[int]]]:
    return alone[0]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_seqs": 1},
        pytest.param({"max_num_seqs": 3}, marks=pytest.mark.long),
        {"max_num_batched_tokens": 1},
        pytest.param({"max_num_batched_tokens": 7}, marks=pytest.mark.long),
        pytest.param(
            {"max_num_batched_tokens": 50, "prefix_caching": False}, marks=pytest.mark.long
        ),
        pytest.param({"kv_cache_tokens": 208}, marks=pytest.mark.long),
        {"kv_cache_tokens": 96, "max_num_batched_tokens": 32},
        {"max_cached_images": 1},
        {"max_patches": 1},
        {"run_ahead": False},
        {"cuda_graphs": False},
        {"prompt_graphs": False},
        {"share_prefix_reads": True},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_division_of_work(
    llm: LLM,
    expected: list[list[list[int]]],
    one_by_one: tuple[torch.Tensor, torch.Tensor],
    sizes: dict[str, Any],
) -> None:
    usual = {name: getattr(llm.engine_config, name) for name in ("run_ahead", "cuda_graphs")}
    if sizes and usual.items() >= sizes.items():
        pytest.skip("these are this engine's settings")
    engine, requests = make_engine(llm, **sizes), make_requests(llm)
    assert answers(engine, requests) == expected
    assert_scores(requests, one_by_one)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preemption_every_seven_steps_changes_no_token(
    llm: LLM,
    expected: list[list[list[int]]],
    one_by_one: tuple[torch.Tensor, torch.Tensor],
    prefix_caching: bool,
) -> None:
    requests = make_requests(llm)
    engine = make_engine(llm, max_num_batched_tokens=8, prefix_caching=prefix_caching)

    def preempt(step: int) -> None:
        if step % 7 == 6 and engine.scheduler.running:
            engine.scheduler.preempt_newest()

    assert answers(engine, requests, preempt) == expected
    assert engine.scheduler.num_preemptions > 3
    assert_scores(requests, one_by_one)


def test_cached_prefixes_change_no_token(
    llm: LLM, expected: list[list[list[int]]], one_by_one: tuple[torch.Tensor, torch.Tensor]
) -> None:
    engine = make_engine(llm)
    for times in range(3):
        requests = make_requests(llm)
        assert answers(engine, requests) == expected
        assert_scores(requests, one_by_one)
        plain = [request for request in requests if request.params.prompt_logprobs is None]
        cached = [request.output().num_cached_tokens for request in plain]
        whole = [(len(r.prompt_token_ids) - 1) // PAGE * PAGE for r in plain]
        assert cached == whole or times == 0


def test_unneeded_pages_are_not_written(llm: LLM) -> None:
    engine = make_engine(llm, kv_cache_tokens=4096)
    requests = make_requests(llm)[:2]
    answers(engine, requests)
    used = sum(engine.scheduler.most_pages(len(s.token_ids)) for r in requests for s in r.sequences)
    for layer in engine.runner.kv_cache.layers:
        for tensor in layer:
            touched = ~tensor.isnan().flatten(1).all(1)
            assert 0 < touched.sum() <= used


def test_canceled_request_does_not_change_others(llm: LLM, expected: list[list[list[int]]]) -> None:
    engine = make_engine(llm, max_num_batched_tokens=30)
    requests = make_requests(llm)

    def cancel(step: int) -> None:
        if step in (1, 5):
            engine.cancel(requests[step])
            engine.scheduler.check_integrity()

    got = answers(engine, requests, cancel)
    for index, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
        assert mine == wanted or index in (1, 5)


def test_finished_requests_leave_no_objects(llm: LLM) -> None:
    engine = make_engine(llm, max_num_seqs=100)

    def serve(count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=2)
        for begin in range(0, count, 100):
            prompts = [{"prompt_token_ids": [1, 5 + (begin + i) % 30000, 7]} for i in range(100)]
            drafts = [llm.request_builder.read_prompt(prompt) for prompt in prompts]
            requests = [llm.request_builder.build(p, params) for p in llm.processor.finish(drafts)]
            answers(engine, requests)

    serve(200)
    gc.collect()
    before = len(gc.get_objects())
    serve(500)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_step_computes_at_most_its_budget(llm: LLM, monkeypatch: Any) -> None:
    engine = make_engine(llm, max_num_batched_tokens=16, cuda_graphs=False)
    sizes = []
    forward = llm.model.hidden_states

    def record(batch: Any, *args: Any) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        return forward(batch, *args)

    monkeypatch.setattr(llm.model, "hidden_states", record)
    answers(engine, make_requests(llm))
    assert max(sizes) == 16


def fail_batches(
    engine: Engine, monkeypatch: Any, fails: Callable[[Any], bool], error: Exception
) -> list[int]:
    """Make the model raise ``error`` on batches that ``fails`` selects.

    Return the sizes of all batches.
    """
    sizes = []
    forward = engine.runner.model.hidden_states

    def raise_or_run(batch: Any, *args: Any) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        if fails(batch):
            raise error
        return forward(batch, *args)

    monkeypatch.setattr(engine.runner.model, "hidden_states", raise_or_run)
    return sizes


@pytest.mark.parametrize("poisoned", [0, 7, 13])
def test_request_that_cannot_be_run_fails_alone(
    llm: LLM, expected: list[list[list[int]]], poisoned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm, max_num_batched_tokens=64, cuda_graphs=False)
    requests = make_requests(llm)
    poison = 9999
    requests[poisoned].prompt_token_ids[-1] = poison
    fail_batches(
        engine, monkeypatch, lambda batch: poison in batch.input_ids, RuntimeError("broken")
    )
    got = answers(engine, requests)
    assert got[:poisoned] == expected[:poisoned]
    assert got[poisoned + 1 :] == expected[poisoned + 1 :]
    assert not any(got[poisoned])
    error = requests[poisoned].output().error
    assert isinstance(error, RequestFailedError)
    assert isinstance(error.__cause__, RuntimeError)
    assert requests[poisoned].finished
    assert engine.scheduler.max_num_seqs == 64


def test_out_of_memory_reduces_the_step_size(
    llm: LLM, expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm, cuda_graphs=False)
    sizes = fail_batches(
        engine, monkeypatch, lambda batch: len(batch.input_ids) > 40, torch.OutOfMemoryError()
    )
    assert answers(engine, make_requests(llm)) == expected
    assert max(sizes) > 40
    assert engine.scheduler.max_num_batched_tokens == 32


@pytest.mark.parametrize(
    ("error", "expected_error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            ConfigError,
            "^kv_cache_tokens 4096: .* enforce_eager$",
        ),
        (RuntimeError("CUDA error: out of memory"), ConfigError, "gpu_memory_utilization"),
        (RuntimeError("broken"), RuntimeError, "^broken$"),
    ],
)
def test_graphs_that_exceed_memory_are_a_config_error(
    exact: LLM,
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    expected_error: type[Exception],
    message: str,
) -> None:
    class FullPool(StandInPool):
        def capture(self, forward: Callable[[], None], *, warm_up: bool) -> StandInGraph:
            if self.num_graphs == 3:
                raise error
            return super().capture(forward, warm_up=warm_up)

    monkeypatch.setattr("idefics2_engine.runtime.model_runner.GraphPool", FullPool)
    with pytest.raises(expected_error, match=message):
        make_engine(exact, cuda_graphs=True)


def test_request_that_exceeds_memory_fails_alone(
    llm: LLM, expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm, cuda_graphs=False)
    requests = make_requests(llm)
    longest = max(requests, key=lambda request: len(request.prompt_token_ids))
    fits = max(
        request.sequences[0].max_length if request.sequences else len(request.prompt_token_ids) + 12
        for request in requests
        if request is not longest
    )

    def is_long(batch: Any) -> bool:
        return bool((batch.paged.context_lens > fits).any())

    fail_batches(engine, monkeypatch, is_long, torch.OutOfMemoryError())
    got = answers(engine, requests)
    for request, mine, wanted in zip(requests, got, expected, strict=True):
        assert mine == wanted or request is longest
    assert isinstance(longest.output().error, RequestFailedError)


@pytest.mark.parametrize("failing_step", [1, 3, 6])
def test_unreadable_tokens_are_drawn_again(
    llm: LLM, expected: list[list[list[int]]], failing_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, choices, calls = make_engine(llm), Drawn.choices, []

    def fail_once(drawn: Drawn) -> Any:
        calls.append(drawn)
        if len(calls) == failing_step:
            raise RuntimeError("broken")
        return choices(drawn)

    monkeypatch.setattr(Drawn, "choices", fail_once)
    requests = make_requests(llm)
    assert answers(engine, requests) == expected
    assert not any(request.error for request in requests)
    assert len(calls) > failing_step


def test_failed_encoder_leaves_no_wrong_features(
    llm: LLM, expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm)
    encode = engine.runner.encode
    calls = []

    def fail_once(encodes: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("broken")
        encode(encodes)

    monkeypatch.setattr(engine.runner, "encode", fail_once)
    requests = make_requests(llm)
    assert answers(engine, requests) == expected
    assert not any(request.error for request in requests)


on_a_gpu = pytest.mark.parametrize(
    "llm", [pytest.param(("cuda", True, True), id="kernels", marks=pytest.mark.gpu)], indirect=True
)


@on_a_gpu
def test_memory_does_not_grow(llm: LLM) -> None:
    engine = make_engine(llm, max_num_batched_tokens=100)
    taken = []
    for _ in range(20):
        answers(engine, make_requests(llm))
        gc.collect()
        torch.cuda.synchronize()
        taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    # The first runs compile kernels and record graphs
    assert len(set(taken[4:])) == 1


@on_a_gpu
def test_only_reading_tokens_waits_for_the_device(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, choices = make_engine(llm), Drawn.choices

    def may_wait(self: Drawn) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return choices(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def serve() -> tuple[list[list[list[int]]], list[Exception | None]]:
        requests = make_requests(llm)
        unscored = [request for request in requests if request.params.prompt_logprobs is None]
        return answers(engine, unscored), [request.error for request in unscored]

    # This run compiles kernels and records graphs
    wanted = serve()
    monkeypatch.setattr(Drawn, "choices", may_wait)
    with warnings.catch_warnings():
        # torch warns that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert serve() == wanted
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_half_precision(device: str, dtype: torch.dtype) -> None:
    """Compare the error in half precision with the error of one pass, by the criterion.

    Where the two best tokens differ by more than twice the allowed error, the better is chosen.
    """
    questions = json.loads((DEMO_IMAGES / "questions.json").read_text())[:4]
    ours, same, exact = (
        LLM(device=where, dtype=kind, max_model_len=400, kv_cache_tokens=448)
        for where, kind in ((device, dtype), ("cpu", dtype), ("cpu", torch.float64))
    )
    cut = {"max_model_len": 400, "max_num_batched_tokens": 50}

    def build_requests(
        llm: LLM, params: SamplingParams, behind: list[list[int]] | None = None
    ) -> Any:
        """Build a request for each question, with its tokens of ``behind`` appended."""
        requests = []
        for index, one in enumerate(questions):
            images = [str(DEMO_IMAGES / name) for name in one["images"]]
            content = [*({"type": "image", "image": path} for path in images)]
            content.append({"type": "text", "text": one["turns"][0][0]})
            draft = llm.processor.draft_chat([{"role": "user", "content": content}])
            (prompt,) = llm.processor.finish([draft])
            if behind:
                prompt = replace(prompt, token_ids=[*prompt.token_ids, *behind[index]])
            requests.append(llm.request_builder.build(prompt, params))
        return requests

    def scores(llm: LLM, texts: list[list[int]], sizes: dict[str, Any]) -> list[torch.Tensor]:
        """Return the log probabilities (positions, vocabulary) of the given answers."""
        requests = build_requests(llm, SamplingParams(max_tokens=1, prompt_logprobs=-1), texts)
        answers(make_engine(llm, **sizes), requests)
        assert not any(request.error for request in requests)
        return [
            torch.tensor(
                [[p[i].logprob for i in range(len(p))] for p in r.prompt_logprobs[-len(text) :]]
            )
            for r, text in zip(requests, texts, strict=True)
        ]

    greedy = build_requests(ours, SamplingParams(temperature=0.0, max_tokens=20))
    texts = [answer[0] for answer in answers(make_engine(ours, **cut), greedy)]
    mine = torch.cat(scores(ours, texts, cut))
    reference, truth = (
        torch.cat(scores(llm, texts, {"max_model_len": 400})) for llm in (same, exact)
    )
    error, eps = (reference - truth).abs().max(), torch.finfo(dtype).eps
    allowed = 2 * (error + eps * truth.abs().max())
    assert (mine - truth).abs().max() <= allowed
    best = truth.topk(2)
    decided = best.values[:, 0] - best.values[:, 1] > 2 * allowed
    assert decided.sum() > 10
    drawn = torch.tensor([token for text in texts for token in text])
    assert torch.equal(drawn[decided], best.indices[decided, 0])
