"""Requests that are read lazily, prepared in threads, and yielded as they finish."""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import (
    ConfigError,
    Idefics2Error,
    ImageError,
    InternalError,
    PromptError,
    PromptTooLongError,
    SamplingError,
)
from idefics2_engine.prefetcher import Prefetcher
from oracle import random_image
from pictures import file, noise

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
# Settings of ``llm``
SETTINGS = {"max_model_len": 200, "max_num_seqs": 4}


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


def test_answers_equal_those_of_generate(llm: LLM) -> None:
    wanted = llm.generate(prompts(13), GREEDY)
    got = tokens(list(llm.iterate(iter(prompts(13)), GREEDY)))
    assert got == {str(i): output.outputs[0].token_ids for i, output in enumerate(wanted)}


def test_outputs_are_yielded_as_they_finish(llm: LLM) -> None:
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


def test_invalid_rows_do_not_affect_others(llm: LLM) -> None:
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
    assert llm.generate("x", GREEDY)
    outputs.close()
    for thread in threading.enumerate():
        if thread.name.startswith(("idefics2-read", "idefics2-prepare")):
            thread.join()


def test_error_of_the_source_reaches_the_caller(llm: LLM) -> None:
    def broken() -> Iterator[str]:
        yield "the chicken"
        raise OSError("disk")

    outputs = llm.iterate(broken(), GREEDY)
    # All rows that were read are answered first
    assert next(outputs).outputs[0].token_ids
    with pytest.raises(OSError, match="disk"):
        next(outputs)
    assert llm.generate("x", GREEDY)


def test_in_flight_must_be_positive(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="in_flight must be an integer of at least 1, got 0"):
        llm.iterate([], in_flight=0)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert list(llm.iterate([])) == []


def test_rows_are_read_in_order_with_bounded_look_ahead() -> None:
    begun: list[int] = []
    prepared: SimpleQueue[int | None] = SimpleQueue()

    def read(index: int, row: int) -> int | None:
        begun.append(row)
        assert index == row
        return None if row == 4 else 10 * row

    taken: list[int] = []
    rows: Prefetcher[int, int] = Prefetcher(
        range(9), lambda: prepared.put(None), threads=3, ahead=4, max_bytes=1
    )
    with rows.start(read, lambda _, ten: prepared.put(ten)):
        while len(taken) < 8 or not rows.has_ended:
            if (one := prepared.get()) is None:
                continue
            taken.append(one)
            # Row 4 is read and never prepared
            assert len(begun) <= len(taken) + 4 + 1
            rows.done()
            if one == 30:
                # This counts row 4 as done
                rows.done()
    assert sorted(taken) == [10 * row for row in range(9) if row != 4]
    assert begun == list(range(9))
    assert (rows.count, rows.error) == (9, None)


def test_progress_bar_shows_counts_and_speed(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = llm.generate(prompts(5), GREEDY)
    assert capsys.readouterr().err == ""
    shown = llm.generate(prompts(5), GREEDY, progress=True)
    printed = capsys.readouterr().err
    assert "5/5" in printed
    pattern = r"in \d+ tok/s, out \d+ tok/s, \d+\.\d tiles/s, cached \d+% tok \d+% tiles, KV \d+%"
    assert re.search(pattern, printed)
    # A CPU has no device seconds
    assert "device waited" not in printed
    assert [o.outputs[0].token_ids for o in shown] == [o.outputs[0].token_ids for o in wanted]
    rows: list[Any] = [*prompts(3), 7]
    list(llm.iterate(rows, GREEDY, progress=True))
    assert "4/4" in capsys.readouterr().err
    list(llm.iterate(iter(prompts(3)), GREEDY, progress=True))
    assert "3request" in capsys.readouterr().err


def test_stats_count_tokens_tiles_and_steps(llm: LLM) -> None:
    stats = llm.engine.stats
    before = replace(stats)
    outputs = llm.generate(prompts(4), SamplingParams(max_tokens=3, min_tokens=3))
    assert stats.generated_tokens - before.generated_tokens == 12
    computed = sum(len(o.prompt_token_ids) - o.num_cached_tokens + 2 for o in outputs)
    assert stats.computed_tokens - before.computed_tokens == computed
    assert stats.encoded_tiles - before.encoded_tiles <= 2
    cached = sum(output.num_cached_tokens for output in outputs)
    assert stats.cached_tokens - before.cached_tokens == cached
    assert stats.steps > before.steps
    assert stats.cache_usage == 0.0


MESSAGE = {"role": "user", "content": "what is left"}


class Unreadable(Mapping[str, Any]):
    """A mapping whose file is gone."""

    def __getitem__(self, key: str) -> Any:
        raise OSError("gone")

    def __iter__(self) -> Iterator[str]:
        raise OSError("gone")

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x",), "a tuple must be a prompt and its SamplingParams, got 1 elements"),
        (("x", GREEDY, 3), "a tuple must be a prompt and its SamplingParams, got 3 elements"),
        ((), "got 0 elements"),
        (Unreadable(), "reading it raised OSError"),
        ([MESSAGE, Unreadable()], "reading it raised OSError"),
        (MESSAGE, "this is one message, and a conversation is a list of messages"),
        ({"id": 3, "messages": [MESSAGE]}, "pass a conversation as its list of messages"),
    ],
)
def test_malformed_row_fails_alone(llm: LLM, row: Any, message: str) -> None:
    outputs = {output.request_id: output for output in llm.iterate(["a", row, "b"], GREEDY)}
    error = outputs["1"].error
    assert isinstance(error, PromptError)
    assert error.code == "prompt"
    assert message in str(error)
    assert all(outputs[place].error is None for place in "02")


def test_conversation_may_be_a_tuple(llm: LLM) -> None:
    rows: list[Any] = [(MESSAGE,), ((MESSAGE, MESSAGE), GREEDY), (MESSAGE, MESSAGE)]
    outputs = tokens(list(llm.iterate(rows, GREEDY)))
    assert outputs["0"] == llm.chat([MESSAGE], GREEDY)[0].outputs[0].token_ids
    assert outputs["1"] == outputs["2"] == llm.chat([MESSAGE] * 2, GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("prompts", ["hi", b"hi", {"prompt": "hi"}, 7, None])
def test_one_prompt_is_not_an_iterable_of_prompts(llm: LLM, prompts: Any) -> None:
    with pytest.raises(PromptError, match="prompts must be an iterable of prompts"):
        llm.iterate(prompts)


@pytest.mark.parametrize("error", [ValueError("x"), MemoryError(), KeyboardInterrupt()])
def test_exception_while_preparing_a_row_fails_that_row(
    llm: LLM, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = type(llm.processor).finish

    def broken(processor: Any, drafts: Any, *args: Any, **kwargs: Any) -> Any:
        if "car" in drafts[0].prompt:
            raise error
        return finish(processor, drafts, *args, **kwargs)

    monkeypatch.setattr(type(llm.processor), "finish", broken)
    outputs = {o.request_id: o for o in llm.iterate(["a", "the red car", "b"], GREEDY)}
    assert isinstance(outputs["1"].error, InternalError)
    assert outputs["1"].error.code == "internal"
    assert outputs["1"].error.__cause__ is error
    assert all(outputs[place].outputs[0].token_ids for place in "02")


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(3)])
def test_rows_read_before_the_source_fails_are_answered(llm: LLM, error: BaseException) -> None:
    def broken() -> Iterator[str]:
        yield from ["the chicken", "the car", "money"]
        raise error

    got: list[Any] = []
    with pytest.raises(type(error)):
        got.extend(llm.iterate(broken(), GREEDY))
    assert {output.request_id for output in got} == {"0", "1", "2"}
    assert all(output.outputs[0].token_ids for output in got)


def test_seed_of_a_row_does_not_depend_on_threads(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=4, min_tokens=4)
    rows: list[Any] = prompts(12)
    # An invalid row draws a seed as well
    rows[5] = 7
    first, second = (
        tokens(
            [o for o in LLM(checkpoint, device="cpu", seed=3).iterate(rows, params) if not o.error]
        )
        for _ in range(2)
    )
    assert first == second


def test_source_may_reuse_its_objects(llm: LLM) -> None:
    content: list[dict[str, Any]] = [{"type": "image", "image": None}, {"type": "text", "text": ""}]
    message = {"role": "user", "content": content}
    images = [random_image(60 + i, 90, seed=i) for i in range(24)]
    pixels = np.zeros((90, 60, 3), np.uint8)

    def conversations() -> Iterator[Any]:
        for i, image in enumerate(images):
            content[0]["image"] = image
            content[1]["text"] = f"what is left of {i}"
            yield [message]

    def arrays() -> Iterator[Any]:
        for image in images:
            pixels[:] = np.asarray(image.resize((60, 90)))
            yield {"prompt": "<image>what is left", "multi_modal_data": {"image": pixels}}

    for source, whole in ((conversations, llm.chat), (arrays, llm.generate)):
        wanted = {}
        for i, row in enumerate(source()):
            wanted[str(i)] = whole(row, GREEDY)[0].outputs[0].token_ids
        assert tokens(list(llm.iterate(source(), GREEDY))) == wanted


def test_outputs_share_nothing_with_the_engine(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=6, min_tokens=6, logprobs=1, prompt_logprobs=1
    )
    whole = llm.generate("the chicken", params)[0]
    for output in llm.stream("the chicken", params):
        output.prompt_token_ids.extend(output.prompt_token_ids)
        answer = output.outputs[0]
        answer.token_ids.clear()
        for place in (*(output.prompt_logprobs or ())[1:], *(answer.logprobs or ())):
            place.clear()
    again = llm.generate("the chicken", params)[0]
    assert again.outputs == whole.outputs
    assert again.prompt_token_ids == whole.prompt_token_ids


def test_outputs_convert_to_plain_data(llm: LLM) -> None:
    scored = SamplingParams(
        max_tokens=3, min_tokens=3, logprobs=2, prompt_logprobs=1, allowed_token_ids=[330]
    )
    rows: list[Any] = [("the chicken", scored), 7]
    good, bad = llm.iterate(rows)
    if good.error:
        good, bad = bad, good
    data = json.loads(json.dumps(good.to_dict(), allow_nan=False))
    assert data["error"] is None
    assert data["outputs"][0]["token_ids"] == good.outputs[0].token_ids
    place = data["outputs"][0]["logprobs"][0]["330"]
    assert place["rank"] == good.outputs[0].logprobs[0][330].rank  # type: ignore[index]
    data = json.loads(json.dumps(bad.to_dict(), allow_nan=False))
    assert data["error"] == {"code": "prompt", "message": str(bad.error)}
    assert data["outputs"] == []
    assert data["key"] is None


def test_errors_name_the_callers_argument(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"^prompts\[1\]: prompt: must have one <image>"):
        llm.generate(["a", "<image>"])
    image = {"type": "image", "image": b"no image"}
    wrong: list[tuple[type[Idefics2Error], str, dict[str, Any]]] = [
        (PromptError, r"^messages\[1\]\[0\]: ", {"role": "teacher", "content": "x"}),
        (ImageError, r"^images\[0\] of messages\[1\]: ", {"role": "user", "content": [image]}),
    ]
    for error, message, second in wrong:
        with pytest.raises(error, match=message):
            llm.chat([[MESSAGE], [second]])


def test_images_may_be_passed_beside_a_conversation(llm: LLM) -> None:
    def user_message(image: Any) -> dict[str, Any]:
        part = {"type": "image"} if image is None else {"type": "image", "image": image}
        return {"role": "user", "content": [part, {"type": "text", "text": "what is left"}]}

    pictures = [random_image(60, 90, seed=i) for i in range(2)]
    wanted = [llm.chat([user_message(picture)], GREEDY)[0].outputs for picture in pictures]
    assert llm.chat([user_message(None)], GREEDY, images=pictures[:1])[0].outputs == wanted[0]
    both = llm.chat([[user_message(None)]] * 2, GREEDY, images=[[picture] for picture in pictures])
    assert [output.outputs for output in both] == wanted
    with pytest.raises(PromptError, match="a list for each of the 2 conversations, got 1"):
        llm.chat([[user_message(None)]] * 2, GREEDY, images=[pictures])


def test_outputs_count_images_and_know_them(llm: LLM) -> None:
    data = file(noise(60, 90), "PNG")
    rows: list[Any] = [
        {"prompt": "<image>and<image>", "multi_modal_data": {"image": [data, noise(80, 70)]}},
        "the chicken",
    ]
    with_images, without = sorted(llm.iterate(rows, GREEDY), key=lambda output: output.request_id)
    (one, other) = with_images.image_info
    assert (one.format, one.width, one.height) == ("PNG", 60, 90)
    assert one.sha256 == sha256(data).hexdigest()
    assert (other.sha256, other.width, other.height) == (None, 80, 70)
    tokens = with_images.prompt_token_ids
    assert with_images.num_image_tokens == tokens.count(llm.config.image_token_id) > 0
    tiles = [tile for image in (data, noise(80, 70)) for tile in llm.images.tiles(image)]
    assert with_images.num_patches == sum(tile.num_patches for tile in tiles)
    assert (without.num_image_tokens, without.num_patches, without.image_info) == (0, 0, ())
