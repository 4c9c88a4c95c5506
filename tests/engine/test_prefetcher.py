"""Rows that are read ahead: within bytes, whichever is ready first, until the job is drained."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from idefics2_engine import LLM, Row, SamplingParams
from idefics2_engine.errors import ConfigError
from idefics2_engine.images.tiling import Tile
from idefics2_engine.prefetcher import HeldTiles, Prefetcher
from oracle import random_image

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
SETTINGS = {"max_model_len": 200, "max_num_seqs": 4, "image_threads": 2}
# Most rows that the model prepares at once
PREPARING = 4


def tile(height: int, width: int) -> Tile:
    return Tile(np.zeros((height, width, 3), np.uint8), 1, 70)


def rows_with_pictures(count: int) -> list[Any]:
    return [
        {
            "prompt": "<image>the chicken",
            "multi_modal_data": {"image": random_image(60 + i, 90, seed=i)},
        }
        for i in range(count)
    ]


def test_shared_tiles_count_once() -> None:
    held, one, other = HeldTiles(), tile(2, 5), tile(1, 7)
    held.add([one, other])
    held.add([one])
    assert held.num_bytes == 30 + 21
    held.remove([one, other])
    assert held.num_bytes == 30
    held.remove([one])
    assert held.num_bytes == 0


def test_no_row_is_read_while_prepared_rows_hold_too_many_bytes() -> None:
    prepared: SimpleQueue[Tile | None] = SimpleQueue()
    rows: Prefetcher[int, int] = Prefetcher(
        range(100), lambda: prepared.put(None), threads=2, ahead=1000, max_bytes=100
    )

    def prepare(_index: int, _draft: int) -> None:
        one = tile(1, 10)
        rows.hold([one])
        prepared.put(one)

    number = 0
    with rows.start(lambda _, row: row, prepare):
        # Four rows have 120 bytes. A reader without a bound would go on in the meantime
        first = [prepared.get() for _ in range(4)]
        threading.Event().wait(0.05)
        assert rows.count <= 4 + PREPARING
        while number < 100:
            one = first.pop() if first else prepared.get()
            if one is not None:
                number += 1
                assert rows.count <= number + 4 + PREPARING
                rows.done([one])
    assert rows.count == 100


@pytest.mark.parametrize("max_bytes", [1, 100_000])
def test_pictures_of_rows_in_flight_are_bounded(llm: LLM, max_bytes: int) -> None:
    yielded = 0
    too_far: list[int] = []
    # A picture of 60 to 89 x 90 pixels is prepared to at least this size
    smallest = min(t.pixels.nbytes for t in llm.images.tiles(random_image(60, 90, seed=0)))
    bound = -(-max_bytes // smallest) + PREPARING

    def source() -> Iterator[Any]:
        for index, row in enumerate(rows_with_pictures(30)):
            # An output is counted here after another row may be read
            if index - yielded > bound + 1:
                too_far.append(index)
            yield row

    for output in llm.iterate(source(), GREEDY, in_flight=30, max_prepared_bytes=max_bytes):
        assert output.error is None
        yielded += 1
    assert yielded == 30
    assert too_far == []


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_max_prepared_bytes_must_be_positive(llm: LLM, value: Any) -> None:
    message = "max_prepared_bytes must be an integer of at least 1, got"
    with pytest.raises(ConfigError, match=message):
        llm.iterate([], max_prepared_bytes=value)


def test_slow_row_does_not_hold_up_later_ones(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, go_on = type(llm.processor).finish, threading.Event()

    def slow(processor: Any, drafts: Any, *args: Any, **kwargs: Any) -> Any:
        if "slow" in drafts[0].prompt:
            go_on.wait()
        return finish(processor, drafts, *args, **kwargs)

    monkeypatch.setattr(type(llm.processor), "finish", slow)
    outputs = llm.iterate(["slow", *["the chicken"] * 20], GREEDY)
    early = {next(outputs).request_id for _ in range(20)}
    assert early == {str(i) for i in range(1, 21)}
    go_on.set()
    assert [output.request_id for output in outputs] == ["0"]


def test_source_that_waits_does_not_hold_up_answers(llm: LLM) -> None:
    go_on = threading.Event()

    def source() -> Iterator[str]:
        yield from ["the chicken", "the car"]
        go_on.wait()
        yield "money"

    outputs = llm.iterate(source(), GREEDY)
    assert {next(outputs).request_id for _ in range(2)} == {"0", "1"}
    go_on.set()
    assert [output.request_id for output in outputs] == ["2"]


def test_drain_answers_the_rows_that_were_read(llm: LLM) -> None:
    given = 0

    def endless() -> Iterator[Row]:
        nonlocal given
        while True:
            given += 1
            yield Row(given, "the chicken")

    outputs = llm.iterate(endless(), GREEDY, in_flight=6)
    keys = [next(outputs).key for _ in range(3)]
    outputs.drain()
    outputs.drain()
    keys += [output.key for output in outputs]
    # The source may have given one row more at this moment, which is dropped
    assert set(keys) in ({*range(1, given + 1)}, {*range(1, given)})
    assert len(keys) == len(set(keys))
    assert next(outputs, None) is None
    assert llm.generate("x", GREEDY)
    assert not llm.engine.has_work


class WaitingSource:
    """Rows, after which the source waits until the end of the test."""

    def __init__(self) -> None:
        self.is_waiting, self.is_over = threading.Event(), threading.Event()

    def rows(self, *rows: str) -> Iterator[str]:
        yield from rows
        self.is_waiting.set()
        self.is_over.wait()


@pytest.fixture
def source() -> Iterator[WaitingSource]:
    source = WaitingSource()
    yield source
    source.is_over.set()


def test_drain_does_not_wait_for_the_source(llm: LLM, source: WaitingSource) -> None:
    outputs = llm.iterate(source.rows("a", "b", "c"), GREEDY)
    got = [next(outputs)]
    assert source.is_waiting.wait(60)
    outputs.drain()
    got += outputs
    assert {output.request_id for output in got} == {"0", "1", "2"}


def drain_by_thread(drain: Callable[[], None], is_waiting: threading.Event) -> None:
    def wait_and_drain() -> None:
        is_waiting.wait(60)
        drain()

    threading.Thread(target=wait_and_drain).start()


def drain_by_signal(drain: Callable[[], None], is_waiting: threading.Event) -> None:
    def wait_and_kill() -> None:
        is_waiting.wait(60)
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, lambda *_: drain())
    threading.Thread(target=wait_and_kill).start()


@pytest.mark.parametrize("drain_by", [drain_by_thread, drain_by_signal])
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of Unix")
def test_drain_ends_a_wait_for_the_next_output(
    llm: LLM, source: WaitingSource, drain_by: Callable[..., None]
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    outputs = llm.iterate(source.rows("the chicken"), GREEDY)
    try:
        drain_by(outputs.drain, source.is_waiting)
        assert [output.request_id for output in outputs] == ["0"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_drained_iterator_reads_nothing_when_it_has_not_begun(llm: LLM) -> None:
    read: list[int] = []
    outputs = llm.iterate((read.append(i) or "x" for i in range(3)), GREEDY)  # type: ignore[func-returns-value]
    outputs.drain()
    assert list(outputs) == []
    assert read == []


def test_error_of_a_drained_source_is_not_raised(llm: LLM) -> None:
    is_waiting, go_on, has_raised = (threading.Event() for _ in range(3))

    def source() -> Iterator[str]:
        try:
            yield "the chicken"
            is_waiting.set()
            go_on.wait(60)
            raise OSError("closed")
        finally:
            has_raised.set()

    outputs = llm.iterate(source(), GREEDY)
    assert next(outputs).request_id == "0"
    assert is_waiting.wait(60)
    outputs.drain()
    go_on.set()
    assert has_raised.wait(60)
    assert list(outputs) == []


def test_iterator_closes_and_is_closed_when_it_is_dropped(llm: LLM) -> None:
    long = SamplingParams(max_tokens=30, min_tokens=30)
    outputs = llm.iterate(["the chicken"] * 8, long)
    assert iter(outputs) is outputs
    with closing(outputs):
        next(outputs)
    assert list(outputs) == []
    outputs.close()
    outputs = llm.iterate(["the chicken"] * 8, long)
    next(outputs)
    del outputs
    assert llm.generate("x", GREEDY)
    assert not llm.engine.has_work


def test_rows_wait_for_their_turn_before_reading_and_before_preparing() -> None:
    calls: list[str] = []
    ended = threading.Event()
    rows: Prefetcher[int, int] = Prefetcher(
        range(2),
        ended.set,
        threads=1,
        ahead=1,
        max_bytes=1,
        wait_turn=lambda: calls.append("turn"),
    )

    def read(index: int, row: int) -> int:
        calls.append(f"read {row}")
        return row

    def prepare(index: int, draft: int) -> None:
        calls.append(f"prepare {draft}")
        rows.done()

    with rows.start(read, prepare):
        ended.wait()
    assert calls[:6] == ["turn", "read 0", "turn", "prepare 0", "turn", "read 1"]
