"""The host's work for a step is in proportion to what changes; calls are counted, not seconds."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.input_batch import pack
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.scheduling.step import Step

SETTINGS = {"max_model_len": 200}
# No end token and no barred one is drawn
TOKEN = 7
PROMPT, STEPS = 5, 40


def make_engine(llm: LLM, count: int, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Build an engine whose forward pass is replaced by constant logits."""
    config = EngineConfig(
        max_model_len=200,
        max_num_seqs=count,
        kv_cache_tokens=count * 256,
        run_ahead=True,
        prefix_caching=False,
    )
    old = llm.engine
    engine = Engine(llm.model, old.tokenizer, llm.processor.image_config, old.generation, config)
    logits = torch.zeros(count, llm.model.config.text.vocab_size)
    logits[:, TOKEN] = 1.0

    def run(step: Step) -> tuple[Tensor, list[Any]]:
        packed = pack(step, config.page_size, 64)
        assert len(packed.input_ids) == step.num_tokens
        return logits[: step.num_sequences].clone(), []

    monkeypatch.setattr(engine.runner, "run", run)

    def sample(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        return logits.argmax(-1)

    engine.sampler.ops = replace(engine.sampler.ops, sample=sample)
    return engine


def add(engine: Engine, count: int, prompt: Callable[[int], int], **options: Any) -> list[Request]:
    params = SamplingParams(**{"ignore_eos": True, "max_tokens": 100, **options})
    requests = [
        Request(str(i), "", [TOKEN] * prompt(i), (), params, seed=i, max_tokens=100)
        for i in range(count)
    ]
    for request in requests:
        engine.add(request)
    return requests


def calls(run: Callable[[], object]) -> int:
    """Return the number of Python and C calls in ``run``."""
    count = 0

    def see(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sequences_that_only_move_on_cost_no_calls(
    llm: LLM, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = []
    for count in (64, 256):
        engine = make_engine(llm, count, monkeypatch)
        requests = add(engine, count, lambda _: PROMPT, temperature=temperature)
        # Two steps ahead of the host, every first token has been read
        for _ in range(3):
            engine.step()
        work.append([calls(engine.step) for _ in range(STEPS)])
        assert all(r.sequences[0].num_generated == STEPS + 2 for r in requests)
        assert engine.stats.generated_tokens == count * (STEPS + 2)
        engine.scheduler.check_integrity()
    assert max(work[0]) <= max(work[1]) <= min(work[0]) + 8
    assert max(work[1]) < 1000


def test_python_runs_for_sequences_that_get_a_page(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal length reach the end of a page one after the other."""
    engine = make_engine(llm, 64, monkeypatch)
    add(engine, 64, lambda index: 1 + index)
    for _ in range(3):
        engine.step()
    work: dict[int, list[int]] = {}
    num_free = engine.scheduler.pages.num_free
    for _ in range(STEPS):
        count = calls(engine.step)
        work.setdefault(num_free - engine.scheduler.pages.num_free, []).append(count)
        num_free = engine.scheduler.pages.num_free
    assert [*work] == [1]
    quiet = make_engine(llm, 64, monkeypatch)
    add(quiet, 64, lambda _: PROMPT)
    for _ in range(3):
        quiet.step()
    assert 0 < max(work[1]) - calls(quiet.step) < 150


def test_a_sequence_that_asks_costs_only_its_own_calls(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = []
    for asking in (0, 1, 2):
        engine = make_engine(llm, 64, monkeypatch)
        add(engine, 64 - asking, lambda _: PROMPT)
        add(engine, asking, lambda _: PROMPT, stop=["never in the text"])
        for _ in range(3):
            engine.step()
        work.append(calls(engine.step))
    assert 0 < work[2] - work[1] <= work[1] - work[0] < 200


def test_only_requests_of_interest_are_reported(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llm, 8, monkeypatch)
    quiet = add(engine, 7, lambda _: PROMPT)
    request = Request(
        "s", "", [TOKEN] * 3, (), SamplingParams(max_tokens=50), seed=0, max_tokens=50
    )
    request.every_token = True
    engine.add(request)
    reported = [engine.step() for _ in range(51)]
    assert reported == [[]] + [[request]] * 50
    assert request.finished
    ended = []
    while engine.has_work:
        ended += engine.step()
    assert ended == quiet


def test_text_is_told_while_a_step_is_in_flight(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llm, 1, monkeypatch)
    (request,) = add(engine, 1, lambda _: PROMPT)
    events: list[str] = []
    run, append = engine.runner.run, type(request.sequences[0]).append

    def launch(step: Step) -> Any:
        events.append("launch")
        return run(step)

    def land(*args: Any) -> None:
        events.append("land")
        append(*args)

    monkeypatch.setattr(engine.runner, "run", launch)
    monkeypatch.setattr(type(request.sequences[0]), "append", land)
    request.every_token = True
    for _ in range(3):
        engine.step(lambda: events.append("tell"))
    assert events == ["launch", "tell", "launch", "tell", "land", "launch", "tell", "land"]
    assert engine.is_ahead
