"""OpenAI's result lines, against models of the public format."""

import json
from dataclasses import replace

import pytest

from idefics2_engine.jobs.writers.openai_format import OpenAiFormat
from idefics2_engine.jobs.writers.row_error import make_row_error
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.outputs import Logprob
from idefics2_engine.sampling_params import SamplingParams
from job_outputs import completion, job_row, mixed_rows, request_output

pytest.importorskip("pydantic", reason="needs the extra test")

from openai_batch import BatchResult, ChatCompletion, ErrorBody

SAVE = SaveOptions(logprobs=True)


class Lines:
    def __init__(self) -> None:
        self.rows: list[bytes] = []
        self.is_finished = False

    def write_row(self, row: bytes) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.is_finished = True


def converted(*rows: bytes, fingerprint: str = "f" * 64) -> list[bytes]:
    lines = Lines()
    made = OpenAiFormat(lines, "demo", fingerprint)
    for row in rows:
        made.write_row(row)
    made.finish()
    assert lines.is_finished
    return lines.rows


def results(*rows: bytes, fingerprint: str = "f" * 64) -> list[BatchResult]:
    return [
        BatchResult.model_validate_json(row) for row in converted(*rows, fingerprint=fingerprint)
    ]


def test_every_line_is_valid() -> None:
    rows = mixed_rows(60, SAVE)
    for result, row in zip(results(*rows), map(json.loads, rows), strict=True):
        assert result.custom_id == str(row["id"])
        if row["error"]:
            assert result.error is not None
            assert result.error.code == row["error"]["code"]
            assert isinstance(result.response.body, ErrorBody)
        else:
            assert result.error is None
            body = result.response.body
            assert isinstance(body, ChatCompletion)
            texts = [choice.message.content for choice in body.choices]
            assert texts == [answer["text"] for answer in row["outputs"]]


def test_answers_are_choices() -> None:
    answers = completion(0, "A star."), replace(completion(1, "No."), finish_reason="length")
    row = encode_answer(job_row(id="a1"), request_output(*answers), SAVE)
    (result,) = results(row)
    body = result.response.body
    assert isinstance(body, ChatCompletion)
    assert (result.custom_id, result.response.status_code) == ("a1", 200)
    assert (body.created, body.model) == (0, "demo")
    assert [(one.index, one.message.content, one.finish_reason) for one in body.choices] == [
        (0, "A star.", "stop"),
        (1, "No.", "length"),
    ]
    assert [one.logprobs for one in body.choices] == [None, None]
    assert body.usage.model_dump() == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
    }


def test_logprobs_have_the_likeliest_tokens_that_were_asked_for() -> None:
    places = [
        {5: Logprob(-0.1, 1, " é")},
        {7: Logprob(float("-inf"), 2, "\ufffd"), 5: Logprob(-0.2, 1, " é")},
    ]
    output = request_output(replace(completion(), logprobs=places))
    wanted = [
        {"token": " é", "logprob": -0.1, "bytes": [32, 195, 169]},
        {"token": "\ufffd", "logprob": -9999.0, "bytes": None},
    ]
    for top, likeliest in ((0, [[], []]), (1, [[-0.1], [-0.2]]), (2, [[-0.1], [-0.2, -9999.0]])):
        row = encode_answer(job_row(sampling_params=SamplingParams(logprobs=top)), output, SAVE)
        body = results(row)[0].response.body
        assert isinstance(body, ChatCompletion)
        assert body.choices[0].logprobs is not None
        content = body.choices[0].logprobs.content or []
        assert [one.model_dump(exclude={"top_logprobs"}) for one in content] == wanted
        assert [[one.logprob for one in place.top_logprobs] for place in content] == likeliest


@pytest.mark.parametrize(
    ("code", "status"),
    [("schema", 400), ("prompt_too_long", 400), ("media_fetch", 400), ("request_failed", 500)],
)
def test_errors_have_a_status(code: str, status: int) -> None:
    (result,) = results(encode_error(job_row(), make_row_error(code, "no")))
    assert result.response.status_code == status
    assert result.error is not None
    assert result.error.model_dump() == {"code": code, "message": "no"}
    assert isinstance(result.response.body, ErrorBody)
    assert result.response.body.error.code == code


def test_id_depends_on_id_row_and_fingerprint() -> None:
    rows = [
        encode_error(job_row(number, id=id), make_row_error("image", "no"))
        for number, id in ((0, "a"), (1, "a"), (0, "b"))
    ]
    ids = {one.id for fingerprint in ("f", "e") for one in results(*rows, fingerprint=fingerprint)}
    assert len(ids) == 6
    assert converted(*rows) == converted(*rows)
