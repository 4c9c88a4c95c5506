"""Requests that are read lazily, prepared in threads, and yielded as they finish."""

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import (
    ConfigError,
    Idefics2Error,
    ImageError,
    PromptError,
    PromptTooLongError,
    SamplingError,
)
from idefics2_engine.intake import Intake
from oracle import random_image
from tiny_checkpoint import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return LLM(folder, device="cpu", dtype="float32", max_model_len=200, max_num_seqs=4)


def prompts(count: int) -> list[Any]:
    return [
        {
            "prompt": "<image>" * (i % 2) + "the chicken sits on " * (1 + i % 5),
            "multi_modal_data": {"image": [random_image(60 + i, 90, seed=i)] * (i % 2)},
        }
        for i in range(count)
    ]


def tokens(outputs: list[Any]) -> dict[str, list[int]]:
    return {output.request_id: output.outputs[0].token_ids for output in outputs}


def test_answers_are_those_of_generate(llm: LLM) -> None:
    wanted = llm.generate(prompts(13), GREEDY)
    got = tokens(list(llm.iterate(iter(prompts(13)), GREEDY)))
    assert got == {str(i): output.outputs[0].token_ids for i, output in enumerate(wanted)}


def test_outputs_come_as_they_finish(llm: LLM) -> None:
    lengths = [30, 2, 9, 4]
    rows = [
        ("the chicken", SamplingParams(max_tokens=length, min_tokens=length)) for length in lengths
    ]
    assert [output.request_id for output in llm.iterate(rows)] == ["1", "3", "2", "0"]


def test_conversations_and_prompts_may_be_mixed(llm: LLM) -> None:
    chat = [{"role": "user", "content": "what is left of the red car"}]
    outputs = list(llm.iterate([chat, "the chicken"], GREEDY))
    assert tokens(outputs) == {
        "0": llm.chat(chat, GREEDY)[0].outputs[0].token_ids,
        "1": llm.generate("the chicken", GREEDY)[0].outputs[0].token_ids,
    }


def test_what_is_wrong_with_one_keeps_no_other(llm: LLM) -> None:
    good = prompts(3)
    bad: dict[str, tuple[Any, type[Idefics2Error]]] = {
        "1": ({"prompt": "x", "multi_modal_data": {"image": b"no image"}}, PromptError),
        "2": ({"prompt": "<image>", "multi_modal_data": {"image": b"no image"}}, ImageError),
        "4": ("word " * 300, PromptTooLongError),
        "5": (7, PromptError),
        "6": (("x", SamplingParams(stop_token_ids=[10**6])), SamplingError),
        "8": (("x", "y"), SamplingError),
    }
    rows: list[Any] = [None] * 9
    for at, prompt in zip((0, 3, 7), good, strict=True):
        rows[at] = prompt
    for place, (row, _) in bad.items():
        rows[int(place)] = row
    outputs: dict[str, Any] = {output.request_id: output for output in llm.iterate(rows, GREEDY)}
    assert outputs.keys() == {str(i) for i in range(9)}
    for place, (_, error) in bad.items():
        assert type(outputs[place].error) is error
        assert outputs[place].finished
        assert not outputs[place].outputs
    wanted = llm.generate(good, GREEDY)
    for place, output in zip(("0", "3", "7"), wanted, strict=True):
        assert outputs[place].error is None
        assert outputs[place].outputs[0].token_ids == output.outputs[0].token_ids


def test_prompts_are_read_lazily(llm: LLM) -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield "the chicken"

    outputs = llm.iterate(endless(), GREEDY, in_flight=3)
    for _ in range(5):
        next(outputs)
    assert len(read) <= 5 + 2 * 3 + 1
    with pytest.raises(RuntimeError, match="unfinished"):
        llm.generate("x", GREEDY)
    outputs.close()
    assert llm.generate("x", GREEDY)
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("intake") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "threads that never end"
        time.sleep(0.01)


def test_an_error_of_the_source_is_the_callers(llm: LLM) -> None:
    def broken() -> Iterator[str]:
        yield "the chicken"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(llm.iterate(broken(), GREEDY))
    assert llm.generate("x", GREEDY)


def test_in_flight_has_a_bound(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="in_flight must be at least 1, got 0"):
        llm.iterate([], in_flight=0)


def test_nothing_gives_nothing(llm: LLM) -> None:
    assert list(llm.iterate([])) == []


def test_an_intake_is_in_order_and_bounded() -> None:
    started = []

    def prepare(row: int) -> int:
        started.append(row)
        time.sleep(0.002 * (row % 3))
        if row == 4:
            raise PromptError("four")
        return 10 * row

    taken = []
    with Intake(range(9), prepare, threads=3, ahead=4) as intake:
        while (next_one := intake.take(wait=True)) is not None:
            taken.append(next_one)
            assert len(started) <= len(taken) + 4
    assert intake.is_empty
    assert [row for row, _ in taken] == list(range(9))
    assert [value for row, value in taken if row != 4] == [10 * row for row in range(9) if row != 4]
    assert isinstance(taken[4][1], PromptError)


def test_a_bar_says_how_far_it_is(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = llm.generate(prompts(5), GREEDY)
    assert capsys.readouterr().err == ""
    shown = llm.generate(prompts(5), GREEDY, progress=True)
    printed = capsys.readouterr().err
    assert "5/5" in printed
    assert re.search(r"in \d+ tok/s, out \d+ tok/s, \d+\.\d tiles/s, cache \d+%", printed)
    assert [o.outputs[0].token_ids for o in shown] == [o.outputs[0].token_ids for o in wanted]
    rows: list[Any] = [*prompts(3), 7]
    list(llm.iterate(rows, GREEDY, progress=True))
    assert "4/4" in capsys.readouterr().err
    list(llm.iterate(iter(prompts(3)), GREEDY, progress=True))
    assert "3request" in capsys.readouterr().err


def test_stats_count_pictures_and_text_apart(llm: LLM) -> None:
    stats = llm._engine.stats
    before = replace(stats)
    outputs = llm.generate(prompts(4), SamplingParams(max_tokens=3, min_tokens=3))
    assert stats.generated_tokens - before.generated_tokens == 12
    computed = sum(len(o.prompt_token_ids) - o.num_cached_tokens + 2 for o in outputs)
    assert stats.computed_tokens - before.computed_tokens == computed
    assert stats.encoded_tiles - before.encoded_tiles <= 2
    assert stats.steps > before.steps
    assert stats.cache_usage == 0.0
