"""The JSON object of a row: keys, order, what is saved, and nothing that a run changes."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.outputs import Logprob, RequestMetrics
from idefics2_engine.sampling_params import SamplingParams
from job_outputs import completion, job_row, request_output

ALL = SaveOptions(token_ids=True, logprobs=True, prompt=True, image_info=True)


def test_answer_is_as_documented() -> None:
    row = job_row(id="a1", keep={"title": "é", "n": [1, None]})
    assert encode_answer(row, request_output(), SaveOptions()).decode() == (
        '{"id":"a1","row":0,"outputs":[{"text":"A star.","finish_reason":"stop",'
        '"stop_reason":null}],"usage":{"prompt_tokens":4,"image_tokens":2,"images":1,'
        '"completion_tokens":2},"error":null,"keep":{"title":"é","n":[1,null]}}'
    )


def test_error_is_as_documented() -> None:
    row = job_row(1, id=7)
    assert encode_error(row, RowError("image", "media", "images[0]: …")).decode() == (
        '{"id":7,"row":1,"outputs":[],"usage":null,"error":{"code":"image","stage":"media",'
        '"message":"images[0]: …"},"keep":{}}'
    )


def test_saved_fields_follow() -> None:
    output = request_output(completion(scored=True), completion(1, "No.", scored=True))
    row = job_row(sampling_params=SamplingParams(logprobs=1))
    data = json.loads(encode_answer(row, output, ALL))
    assert list(data) == [
        *("id", "row", "outputs", "usage", "error", "keep"),
        *("prompt", "image_info"),
    ]
    assert data["prompt"] == "<image>What is this?"
    assert data["image_info"] == [
        {
            "sha256": "ab" * 32,
            "size": [40, 30],
            "mode": "RGB",
            "format": "PNG",
            "orientation": 6,
            "warnings": ["cut off"],
        }
    ]
    first, second = data["outputs"]
    assert list(first) == ["text", "token_ids", "logprobs", "finish_reason", "stop_reason"]
    assert second["text"] == "No."
    assert first["token_ids"] == [5, 7]
    assert first["logprobs"] == [
        {**token(5, " A", -0.1, 1), "top": [token(5, " A", -0.1, 1)]},
        # The generated token is none of the likeliest
        {**token(7, " star", None, 9), "top": [token(5, " A", -0.25, 1)]},
    ]
    assert data["usage"]["completion_tokens"] == 4


def token(token_id: int, text: str, logprob: float | None, rank: int) -> dict[str, Any]:
    return {"token_id": token_id, "token": text, "logprob": logprob, "rank": rank}


def test_no_likeliest_tokens_are_saved_where_none_are_asked_for() -> None:
    row = job_row(sampling_params=SamplingParams(logprobs=0))
    data = json.loads(encode_answer(row, request_output(completion(scored=True)), ALL))
    assert [place["top"] for place in data["outputs"][0]["logprobs"]] == [[], []]


def test_logprobs_that_were_not_asked_for_are_null() -> None:
    data = json.loads(encode_answer(job_row(), request_output(), ALL))
    assert data["outputs"][0]["logprobs"] is None


def test_tokens_of_any_text_are_one_line_of_json() -> None:
    texts = ['"', "\\", "\n\r\u2028", "\0", "é★", '","logprob":-inf', "\ud800"]
    place = {index: Logprob(-index / 3, index + 1, text) for index, text in enumerate(texts)}
    answer = replace(completion(), token_ids=[3, 1], logprobs=[place, place])
    row = job_row(sampling_params=SamplingParams(logprobs=len(texts)))
    line = encode_answer(row, request_output(answer), ALL)
    assert len(line.splitlines()) == 1
    (found,) = json.loads(line)["outputs"]
    tokens = [token(index, text, -index / 3, index + 1) for index, text in enumerate(texts)]
    assert found["logprobs"] == [{**tokens[own], "top": tokens} for own in (3, 1)]
    broken = replace(answer, logprobs=[{3: Logprob(math.nan, 1, "a")}] * 2)
    with pytest.raises(ValueError, match="must be a number, got nan"):
        encode_answer(row, request_output(broken), ALL)


def test_nothing_that_a_run_changes_is_in_the_row() -> None:
    output = request_output()
    other = replace(
        output,
        request_id="99",
        num_cached_tokens=0,
        metrics=RequestMetrics(7.0, None, 9.0),
    )
    row, moved = job_row(), job_row(place="elsewhere: line 7", index=5)
    assert encode_answer(row, output, ALL) == encode_answer(moved, other, ALL)


def test_save_options_are_parsed() -> None:
    assert SaveOptions.parse("token_ids, prompt") == SaveOptions(token_ids=True, prompt=True)
    assert SaveOptions.parse("") == SaveOptions()
    with pytest.raises(ConfigError, match=r"--save must list some of .*, got 'times'"):
        SaveOptions.parse("prompt,times")
