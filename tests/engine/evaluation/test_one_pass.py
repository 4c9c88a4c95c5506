"""Requests of harnesses in one pass: order, bad pictures, errors of tasks."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from PIL import Image

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ImageError
from idefics2_engine.evaluation.one_pass import Question, answer_all
from idefics2_engine.evaluation.picture_text import message_parts
from oracle import random_image

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=2)
SETTINGS = {"max_model_len": 200, "max_num_seqs": 4}


def name(index: int) -> str:
    return f"document {index}"


def prompt(index: int) -> dict[str, Any]:
    return {
        "prompt": "<image>" + "the chicken sits on " * (1 + index % 4),
        "multi_modal_data": {"image": random_image(60 + index, 90, seed=index)},
    }


def question(index: int) -> Question:
    length = 2 + 5 * (index % 3)
    params = SamplingParams(temperature=0.0, max_tokens=length, min_tokens=length)
    return prompt(index), params


def test_outputs_are_in_the_order_of_the_requests(llm: LLM) -> None:
    params = [question(index)[1] for index in range(13)]
    wanted = llm.generate([prompt(index) for index in range(13)], params)
    order: list[int] = []
    outputs = answer_all(
        llm,
        [partial(question, index) for index in range(13)],
        name,
        lambda index, _output: order.append(index),
    )
    assert [one.outputs[0].token_ids for one in outputs if one is not None] == [
        one.outputs[0].token_ids for one in wanted
    ]
    assert sorted(order) == [*range(13)]


def test_a_question_that_is_not_asked_has_no_output(llm: LLM) -> None:
    makers: list[Callable[[], Question | None]] = [lambda: None, partial(question, 1), lambda: None]
    outputs = answer_all(llm, makers, name)
    assert [output is None for output in outputs] == [True, False, True]


@pytest.mark.parametrize("error", [OSError, SyntaxError, Image.DecompressionBombError])
def test_a_picture_that_cannot_be_opened_costs_its_own_answer(
    llm: LLM, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def broken() -> Question:
        raise error("cut off")

    def unreadable() -> Question:
        return {"prompt": "<image>a", "multi_modal_data": {"image": b"nothing"}}, GREEDY

    outputs = answer_all(llm, [broken, partial(question, 1), unreadable], name)
    errors = [output.error for output in outputs if output is not None]
    assert [type(one) for one in errors] == [ImageError, type(None), ImageError]
    assert str(errors[0]) == f"{error.__name__}: cut off"
    said = [record.getMessage() for record in caplog.records]
    assert f"document 0 has no answer: {error.__name__}: cut off" in said
    assert f"document 2 has no answer: {errors[2]}" in said
    assert "2 of 3 requests have no answer" in said


def test_an_error_of_the_task_ends_the_evaluation(llm: LLM) -> None:
    def wrong() -> Question:
        raise KeyError("question")

    with pytest.raises(KeyError, match="question"):
        answer_all(llm, [partial(question, 0), wrong], name)


def test_makers_run_ahead_on_as_many_threads_as_read_images(llm: LLM) -> None:
    """All of the first ones are running before any of them returns."""
    threads = llm.images.num_threads
    together = threading.Barrier(threads)

    def ask(index: int) -> Question:
        if index < threads:
            together.wait(timeout=60)
        return question(index)

    outputs = answer_all(llm, [partial(ask, index) for index in range(threads + 3)], name)
    assert None not in outputs


def test_text_is_divided_at_its_pictures() -> None:
    picture = {"type": "image", "image": "a.png"}
    other = {"type": "image", "image": "b.png"}
    open_place = {"type": "image", "image": None}
    said = {"type": "text", "text": "Look."}
    assert message_parts("Look.", ["a.png", "b.png"]) == [picture, other, said]
    assert message_parts("Look.<image><image>", ["a.png", "b.png"]) == [said, picture, other]
    assert message_parts("<image>Look.", ["a.png", "b.png"]) == [picture, said, other]
    assert message_parts("Look.<image>") == [said, open_place]
    assert message_parts("") == [{"type": "text", "text": ""}]
