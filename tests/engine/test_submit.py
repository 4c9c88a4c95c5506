"""Futures of single rows: from any thread and event loop, canceled, interrupted, and closed."""

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idefics2_engine import LLM, Row, SamplingParams
from idefics2_engine.errors import (
    Idefics2Error,
    ImageError,
    InternalError,
    PromptError,
    PromptTooLongError,
    RequestFailedError,
    SamplingError,
)
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.model_runner import Runner
from idefics2_engine.scheduling.scheduler import Scheduler
from interrupts import run_until
from oracle import random_image

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=6)
SETTINGS: dict[str, Any] = {"max_model_len": 200, "max_num_seqs": 4, "image_threads": 2}
TIMEOUT = 60


def prompts(count: int) -> list[Any]:
    return [
        {
            "prompt": "<image>" * (i % 2) + "the chicken sits on " * (1 + i % 5),
            "multi_modal_data": {"image": [random_image(60 + i, 90, seed=i)] * (i % 2)},
        }
        for i in range(count)
    ]


def token_ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.fixture
def own_llm(checkpoint: Path) -> Iterator[LLM]:
    """Return a model that the test may close."""
    with LLM(checkpoint, device="cpu", dtype="float32", **SETTINGS) as llm:
        yield llm


class Gate:
    """A method that waits, once it is called, until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def waiting(*args: Any, **kwargs: Any) -> Any:
            self.is_reached.set()
            self.is_open.wait(TIMEOUT)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, waiting)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_refuses_to_be_sent_to_another_process(llm: LLM, duplicate: Any) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied; build one in each process"):
        duplicate(llm)


def test_answers_equal_those_of_generate_and_chat(llm: LLM) -> None:
    rows = prompts(9)
    futures = [llm.submit(row, GREEDY) for row in rows]
    got = [token_ids(future.result(TIMEOUT)) for future in futures]
    assert got == [token_ids(output) for output in llm.generate(rows, GREEDY)]
    chat = [{"role": "user", "content": "what is left of the red car"}]
    assert token_ids(llm.submit(chat, GREEDY).result(TIMEOUT)) == token_ids(
        llm.chat(chat, GREEDY)[0]
    )


def test_row_has_its_own_parameters_and_key(llm: LLM) -> None:
    two = SamplingParams(temperature=0.0, max_tokens=2, min_tokens=2)
    of_row = llm.submit(Row("a1", "the chicken", two), GREEDY).result(TIMEOUT)
    of_pair = llm.submit(("the chicken", two), GREEDY).result(TIMEOUT)
    of_call = llm.submit(Row(7, "the chicken"), GREEDY).result(TIMEOUT)
    assert [len(token_ids(output)) for output in (of_row, of_pair, of_call)] == [2, 2, 6]
    assert [output.key for output in (of_row, of_pair, of_call)] == ["a1", None, 7]
    assert len({output.request_id for output in (of_row, of_pair, of_call)}) == 3


def test_key_gives_the_same_answer_as_in_iterate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, min_tokens=8)
    rows = [Row(f"row {i}", "the chicken sits on") for i in range(5)]
    by_key = {output.key: token_ids(output) for output in llm.iterate(rows, params)}
    futures = [llm.submit(row, params) for row in reversed(rows)]
    outputs = [future.result(TIMEOUT) for future in futures]
    assert {output.key: token_ids(output) for output in outputs} == by_key
    # Rows without a key draw different seeds
    futures = [llm.submit("the chicken sits on", params) for _ in range(5)]
    assert len({tuple(token_ids(future.result(TIMEOUT))) for future in futures}) > 1


def test_threads_submit_at_once(llm: LLM) -> None:
    rows = prompts(6)
    wanted = [token_ids(output) for output in llm.generate(rows, GREEDY)]

    def answer(_: int) -> list[list[int]]:
        futures = [llm.submit(row, GREEDY) for row in rows]
        return [token_ids(future.result(TIMEOUT)) for future in futures]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(4))) == [wanted] * 4


def test_event_loop_awaits_futures(llm: LLM) -> None:
    rows = prompts(5)
    wanted = [token_ids(output) for output in llm.generate(rows, GREEDY)]

    async def answer_all() -> list[list[int]]:
        futures = [asyncio.wrap_future(llm.submit(row, GREEDY)) for row in rows]
        return [token_ids(output) for output in await asyncio.gather(*futures)]

    assert asyncio.run(answer_all()) == wanted


BAD: list[tuple[Any, Any, type[Idefics2Error]]] = [
    (7, GREEDY, PromptError),
    ({"prompt": "<image>", "multi_modal_data": {"image": b"no image"}}, GREEDY, ImageError),
    ("word " * 300, GREEDY, PromptTooLongError),
    ("x", SamplingParams(stop_token_ids=[10**6]), SamplingError),
    ("x", "greedy", SamplingError),
    (Row(1, "x", "greedy"), GREEDY, SamplingError),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("row", "params", "error"), BAD)
def test_error_of_a_row_is_its_futures_exception(
    llm: LLM, row: Any, params: Any, error: type[Idefics2Error]
) -> None:
    good, bad = llm.submit("the chicken", GREEDY), llm.submit(row, params)
    assert type(bad.exception(TIMEOUT)) is error
    assert good.result(TIMEOUT).error is None


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_while_preparing_is_the_futures(
    llm: LLM, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patches:
        patches.setattr(type(llm.processor), "finish", broken)
        found = llm.submit("the chicken", GREEDY).exception(TIMEOUT)
    assert isinstance(found, InternalError)
    assert found.__cause__ is error
    assert llm.submit("the chicken", GREEDY).result(TIMEOUT).error is None


def test_failed_request_is_its_futures_exception(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError("no forward pass")

    with monkeypatch.context() as patches:
        patches.setattr(Runner, "run", broken)
        assert isinstance(llm.submit("x", GREEDY).exception(TIMEOUT), RequestFailedError)
    assert llm.submit("x", GREEDY).result(TIMEOUT).error is None


def test_fault_of_the_engine_reaches_futures(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("pages")

    with monkeypatch.context() as patches:
        patches.setattr(Scheduler, "schedule", broken)
        assert isinstance(llm.submit("x", GREEDY).exception(TIMEOUT), AssertionError)
    assert llm.submit("x", GREEDY).result(TIMEOUT).error is None


def test_row_is_copied_before_submit_returns(llm: LLM) -> None:
    pixels = np.zeros((90, 60, 3), np.uint8)
    row = {"prompt": "<image>what is left", "multi_modal_data": {"image": pixels}}
    wanted, futures = [], []
    for seed in range(4):
        pixels[:] = np.asarray(random_image(60, 90, seed=seed).resize((60, 90)))
        wanted.append(token_ids(llm.generate(row, GREEDY)[0]))
        futures.append(llm.submit(row, GREEDY))
    pixels[:] = 0
    assert [token_ids(future.result(TIMEOUT)) for future in futures] == wanted


def test_row_that_is_canceled_while_it_is_prepared_is_never_run(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    add = Engine.add

    def counted(engine: Engine, request: Any) -> None:
        added.append(request.prompt)
        add(engine, request)

    monkeypatch.setattr(Engine, "add", counted)
    with monkeypatch.context() as patches:
        gate = Gate(patches, type(llm.processor), "finish")
        canceled = [llm.submit(f"canceled {i}", GREEDY) for i in range(5)]
        assert gate.is_reached.wait(TIMEOUT)
        assert all(future.cancel() for future in canceled)
        kept = llm.submit("kept", GREEDY)
        gate.is_open.set()
        assert kept.result(TIMEOUT).error is None
    assert all(future.cancelled() for future in canceled)
    assert wait(canceled, TIMEOUT).not_done == set()
    assert added == ["kept"]


def test_cancel_ends_a_running_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    long = SamplingParams(max_tokens=150, min_tokens=150)
    with monkeypatch.context() as patches:
        gate = Gate(patches, Runner, "run")
        running = llm.submit("the chicken", long)
        assert gate.is_reached.wait(TIMEOUT)
        assert running.cancel()
        assert running.cancel()
        gate.is_open.set()
        assert wait([running], TIMEOUT).not_done == set()
    before = llm.stats.generated_tokens
    assert llm.submit("x", GREEDY).result(TIMEOUT).error is None
    assert not llm.engine.has_work
    assert llm.stats.generated_tokens - before < 150


def test_finished_future_cannot_be_canceled(llm: LLM) -> None:
    future = llm.submit("x", GREEDY)
    output = future.result(TIMEOUT)
    assert not future.cancel()
    assert future.result() is output


def test_canceled_task_cancels_its_request(llm: LLM) -> None:
    futures: list[Future[RequestOutput]] = []

    async def give_up() -> None:
        futures.append(llm.submit("x", SamplingParams(max_tokens=150, min_tokens=150)))
        task = asyncio.ensure_future(asyncio.wrap_future(futures[0]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert futures[0].cancelled()


def test_callback_may_call_the_model_and_fail(llm: LLM) -> None:
    said: Future[list[int]] = Future()

    def ask_again(future: Future[RequestOutput]) -> None:
        output = llm.generate(future.result().prompt, GREEDY)[0]
        said.set_result(token_ids(output))
        raise SystemExit("a callback that fails")

    future = llm.submit("the chicken", GREEDY)
    future.add_done_callback(ask_again)
    assert said.result(TIMEOUT) == token_ids(future.result(TIMEOUT))
    assert llm.submit("x", GREEDY).result(TIMEOUT).error is None


def submit_threads() -> set[threading.Thread]:
    names = ("idefics2-submit", "idefics2-answer")
    return {thread for thread in threading.enumerate() if thread.name.startswith(names)}


def test_close_fails_unfinished_futures(own_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = submit_threads()
    step = Gate(monkeypatch, Runner, "run")
    running = own_llm.submit("the chicken", GREEDY)
    threads = submit_threads() - before
    assert step.is_reached.wait(TIMEOUT)
    preparation = Gate(monkeypatch, type(own_llm.processor), "finish")
    preparing = [own_llm.submit("the car", GREEDY) for _ in range(4)]
    assert preparation.is_reached.wait(TIMEOUT)
    closing = threading.Thread(target=own_llm.close)
    closing.start()
    step.is_open.set()
    for future in (running, *preparing):
        error = future.exception(TIMEOUT)
        assert type(error) is RuntimeError
        assert "closed before it had answered" in str(error)
    closing.join(TIMEOUT)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError, match="this model was closed"):
        own_llm.submit("x", GREEDY)
    preparation.is_open.set()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_dropped_model_fails_its_futures(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = submit_threads()
    llm = LLM(checkpoint, device="cpu", dtype="float32", **SETTINGS)
    llm.submit("x", GREEDY).result(TIMEOUT)
    threads = submit_threads() - before
    assert len(threads) == 3
    gate = Gate(monkeypatch, type(llm.processor), "finish")
    future = llm.submit("x", GREEDY)
    assert gate.is_reached.wait(TIMEOUT)
    del llm
    gc.collect()
    gate.is_open.set()
    assert isinstance(future.exception(TIMEOUT), RuntimeError)
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_interrupt_leaves_nothing_locked(llm: LLM) -> None:
    """Interrupt a call at several lines, in one run for each, while another future is open."""
    wanted = token_ids(llm.generate("the chicken", GREEDY)[0])

    def answer() -> None:
        llm.submit("the chicken", GREEDY).result(TIMEOUT)

    def give_up() -> None:
        llm.submit("the chicken", GREEDY).cancel()

    for call in (answer, give_up):
        total = run_until(-1, call)
        assert total > 20
        for line in range(1, total, 1 + total // 6):
            open_future = llm.submit("the chicken", GREEDY)
            with pytest.raises(KeyboardInterrupt):
                run_until(line, call)
            assert token_ids(open_future.result(TIMEOUT)) == wanted
    assert token_ids(llm.generate("the chicken", GREEDY)[0]) == wanted
