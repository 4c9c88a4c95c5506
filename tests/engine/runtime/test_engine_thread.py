"""The engine on its own thread: interrupts at any point, concurrent calls, and closing a model."""

import gc
import itertools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import RequestFailedError
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.model_runner import Runner
from idefics2_engine.sampling.sampler import Drawn, Sampler
from idefics2_engine.scheduling.page_allocator import PageAllocator
from idefics2_engine.scheduling.scheduler import Scheduler
from idefics2_engine.scheduling.sequence import Request, Sequence
from interrupts import run_until
from oracle import random_image

PARAMS = SamplingParams(temperature=0.0, max_tokens=5, min_tokens=5, logprobs=1)
PICTURES = [random_image(60 + 30 * i, 140 - 20 * i, seed=i) for i in range(3)]


Load = Callable[..., LLM]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def load(request: pytest.FixtureRequest, checkpoint: Path) -> Load:
    """Return a function that loads a tiny checkpoint; its arguments extend the common settings."""
    settings = {"device": request.param, "dtype": "float32", "max_model_len": 200}
    return partial(LLM, checkpoint, **settings, kv_cache_tokens=4096, max_num_seqs=16)


@pytest.fixture(scope="module")
def llm(load: Load) -> LLM:
    return load()


def rows() -> list[Any]:
    common = "A common beginning that fills a page or two of the cache, or even three. "
    return [
        {
            "prompt": "<image>" * (i % 3) + common + "the chicken sits " * i,
            "multi_modal_data": {"image": PICTURES[: i % 3]},
        }
        for i in range(5)
    ]


def conversation(image: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what is left of it"}]
    return [{"role": "user", "content": parts}]


def by_generate(llm: LLM) -> list[Any]:
    return llm.generate(rows(), PARAMS)


def by_chat(llm: LLM) -> list[Any]:
    return llm.chat([conversation(picture) for picture in PICTURES], PARAMS)


def by_iterate(llm: LLM) -> list[Any]:
    return sorted(llm.iterate(rows(), PARAMS), key=lambda output: output.request_id)


def by_stream(llm: LLM) -> list[Any]:
    return [list(llm.stream(row, PARAMS))[-1] for row in rows()[:3]]


CALLS = [by_generate, by_chat, by_iterate, by_stream]


def answers(llm: LLM, *calls: Callable[[LLM], list[Any]]) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log probabilities of the answers to ``calls``, by default ``CALLS``."""
    return [
        (
            answer.token_ids,
            [place[t].logprob for t, place in zip(answer.token_ids, answer.logprobs, strict=True)],
        )
        for call in calls or CALLS
        for output in call(llm)
        for answer in output.outputs
    ]


def assert_equal(got: list[Any], wanted: list[Any]) -> None:
    """Compare tokens exactly and log probabilities approximately.

    The rounding of sums depends on the order of the batch.
    """
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in wanted]
    for (_, mine), (_, theirs) in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def expected(load: Load) -> list[Any]:
    return answers(load())


def raise_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int, act: Callable[[], None]
) -> list[int]:
    """Run ``act`` before call number ``at`` of the method ``name`` of ``owner``.

    Return a list with one element for each call so far.
    """
    calls: list[int] = []
    method = getattr(owner, name)

    def acting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            act()
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, acting)
    return calls


class Interrupt(BaseException):
    """An exception that is neither an ``Exception`` nor a fault of a request."""


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (Runner, "encode", 1),
        (Runner, "run", 2),
        (Runner, "store_last_tokens", 1),
        (Sampler, "draw", 2),
        (Drawn, "choices", 1),
        (Scheduler, "schedule", 2),
        (PageAllocator, "allocate", 3),
        (Scheduler, "computed", 1),
        (Scheduler, "finish", 1),
        (Sequence, "append", 2),
        (Engine, "add", 1),
    ],
)
def test_interrupt_inside_a_step_leaves_the_engine_usable(
    llm: LLM,
    expected: list[Any],
    owner: type,
    name: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupt each kind of call inside each part of a step.

    The caches are emptied before each call, so that every call reaches the interrupted method.
    """
    for call, error in zip(CALLS, itertools.cycle([KeyboardInterrupt, Interrupt]), strict=False):

        def act(error: type[BaseException] = error) -> None:
            raise error("now")

        llm.engine.reset()
        with monkeypatch.context() as patches:
            raise_once(patches, owner, name, at, act)
            with pytest.raises(error, match="now"):
                call(llm)
        assert_equal(answers(llm, by_generate), expected[: len(rows())])
    llm.engine.scheduler.pages.check_integrity([])


def test_engine_fault_reaches_the_caller_and_leaves_the_engine_usable(
    load: Load, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load()

    def act() -> None:
        raise AssertionError("pages")

    with monkeypatch.context() as patches:
        raise_once(patches, Scheduler, "schedule", 2, act)
        with pytest.raises(AssertionError, match="pages"):
            by_generate(llm)
    assert_equal(answers(llm), expected)


def test_token_without_text_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [output.outputs[0].token_ids for output in by_generate(llm)]

    def act() -> None:
        raise ValueError("no text")

    raise_once(monkeypatch, Sequence, "append", 3, act)
    outputs = by_generate(llm)
    failed = [i for i, output in enumerate(outputs) if output.error]
    assert len(failed) == 1
    assert isinstance(outputs[failed[0]].error, RequestFailedError)
    for i, output in enumerate(outputs):
        assert i in failed or output.outputs[0].token_ids == wanted[i]


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS)
def test_interrupt_in_the_callers_thread_leaves_the_engine_usable(
    llm: LLM, expected: list[Any], call: Callable[[LLM], list[Any]]
) -> None:
    """Interrupt the call at one of about nine lines, in one run for each line."""

    # A second call is shorter, because conversations of the first one are kept
    call(llm)
    total = run_until(-1, lambda: call(llm))
    assert total > 100
    for line in range(1, total, total // 8):
        with pytest.raises(KeyboardInterrupt):
            run_until(line, lambda: call(llm))
    assert_equal(answers(llm), expected)
    llm.engine.scheduler.pages.check_integrity([])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="a signal of Unix")
def test_timeout_reaches_the_caller(
    load: Load, expected: list[Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load()

    def handle(*_: Any) -> None:
        raise TimeoutError("too late")

    def act() -> None:
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with monkeypatch.context() as patches:
            raise_once(patches, Runner, "run", 2, act)
            with pytest.raises(TimeoutError, match="too late"):
                llm.generate(rows()[:count], PARAMS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_equal(answers(llm), expected)


def test_interrupt_among_many_requests_leaves_no_work(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        raise_once(patches, Engine, "add", 50, act)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the chicken"] * 100, PARAMS)
    assert len(llm.generate(["the chicken"] * 3, PARAMS)) == 3
    assert not llm.engine.has_work


def test_threads_share_the_engine(llm: LLM, expected: list[Any]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(answers, [llm] * 4):
            assert_equal(got, expected)


def test_calls_may_be_nested(llm: LLM) -> None:
    """Calls give their usual answers while a stream and two iterators are open."""
    wanted = [output.outputs[0].token_ids for output in by_generate(llm)]
    one, other = (llm.iterate(rows(), PARAMS, in_flight=1) for _ in range(2))
    stream = llm.stream(rows()[1], PARAMS)
    next(stream)
    pairs = list(zip(one, other, strict=True))
    for outputs in zip(*pairs, strict=True):
        got = {output.request_id: output.outputs[0].token_ids for output in outputs}
        assert got == {str(i): ids for i, ids in enumerate(wanted)}
    assert [o.outputs[0].token_ids for o in by_generate(llm)] == wanted
    assert list(stream)[-1].outputs[0].token_ids == wanted[1]


class _Autocast:
    def __enter__(self) -> None:
        self._contexts = ExitStack()
        for kind in ("cpu", *["cuda"] * torch.cuda.is_available()):
            self._contexts.enter_context(torch.autocast(kind, torch.bfloat16))

    def __exit__(self, *_: Any) -> None:
        self._contexts.close()


class _DefaultDtype:
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(torch.float32)


class _DefaultDevice:
    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *_: Any) -> None:
        torch.set_default_device(None)


@pytest.fixture(scope="module", params=[None, "nf4"])
def outside(load: Load, request: pytest.FixtureRequest) -> tuple[str | None, LLM, list[Any]]:
    """Return a quantization, a model loaded with it under torch's defaults, and its answers."""
    if request.param is not None and load().model.device.type == "cuda":
        pytest.skip("in 16 bit, which NF4 needs there, the order of sums may change a token")
    llm = load(quantization=request.param)
    return request.param, llm, answers(llm)


@pytest.mark.parametrize("setting", [_Autocast, _DefaultDtype, _DefaultDevice])
def test_callers_torch_settings_change_no_answer(
    load: Load, setting: Callable[[], Any], outside: tuple[str | None, LLM, list[Any]]
) -> None:
    quantization, loaded_outside, wanted = outside
    with setting():
        loaded_inside = load(quantization=quantization)
        assert_equal(answers(loaded_outside), wanted)
        assert_equal(answers(loaded_inside), wanted)
    assert_equal(answers(loaded_inside), wanted)


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "idefics2-engine"}


def test_closed_model_is_freed_and_refuses_calls(load: Load) -> None:
    before = engine_threads()
    with load() as llm:
        model = weakref.ref(llm.model)
        stream = llm.stream("the chicken", PARAMS)
        next(stream)
        (thread,) = engine_threads() - before
    thread.join(60)
    assert not thread.is_alive()
    assert model() is None
    for call in (by_generate, by_chat, by_iterate, by_stream):
        with pytest.raises(RuntimeError, match="this model was closed"):
            call(llm)
    with pytest.raises(RuntimeError, match="closed before it had answered"):
        list(stream)
    llm.close()


def test_waiting_call_raises_when_the_model_is_closed(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load()
    in_step, go_on = threading.Event(), threading.Event()

    def act() -> None:
        in_step.set()
        go_on.wait(60)

    raise_once(monkeypatch, Runner, "run", 2, act)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(by_generate, llm)
        in_step.wait(60)
        closing = pool.submit(llm.close)
        go_on.set()
        with pytest.raises(RuntimeError, match="closed before it had answered"):
            waiting.result(60)
        closing.result(60)


def test_unreferenced_model_ends_its_thread(load: Load) -> None:
    before = engine_threads()
    llm = load()
    llm.generate("the chicken", PARAMS)
    (thread,) = engine_threads() - before
    del llm
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_abandoned_source_does_not_block_the_engine(llm: LLM) -> None:
    """The source never yields its next row, so closing the iterator abandons it."""
    never = threading.Event()

    def source() -> Iterator[str]:
        yield "the chicken"
        never.wait()

    outputs = llm.iterate(source(), PARAMS)
    assert next(outputs).outputs[0].token_ids
    outputs.close()
    assert llm.generate("the car", PARAMS)
    never.set()


def test_checks_per_request_do_not_depend_on_the_number_of_requests(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def finished(request: Request) -> bool:
        nonlocal looks
        looks += 1
        return request.error is not None or all(s.finish_reason for s in request.sequences)

    monkeypatch.setattr(Request, "finished", property(finished))
    each = []
    for count in (16, 160):
        looks = 0
        prompts = [{"prompt_token_ids": [1, 5, 7]}] * count
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate(prompts, params, progress=True)
        generated = looks / count
        looks = 0
        list(llm.iterate(prompts, params))
        each.append((generated, looks / count))
    assert each[0] == each[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only some systems fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_gets_an_error(llm: LLM) -> None:
    """A forked process has the ``LLM`` object but not the engine's thread."""
    process = os.fork()
    if process == 0:
        try:
            llm.generate("the chicken", PARAMS)
        except RuntimeError as error:
            os._exit(0 if "forked process" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
