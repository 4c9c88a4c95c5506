"""OpenAI's batch lines: which keys are honored, and that all others are an error of their row."""

from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.sampling_params import SamplingParams
from job_inputs import DEFAULTS, error_of, images_of, read_rows, text_of, write_rows

MESSAGES = [{"role": "user", "content": "Why?"}]


def line(body: object = None, **others: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES} if body is None else body
    top = {"custom_id": "a1", "method": "POST", "url": "/v1/chat/completions", "body": given}
    return top | others


def one(folder: Path, row: dict[str, Any], **options: Any) -> JobRow:
    path = write_rows(folder / "q.jsonl", [row])
    (found,) = read_rows(path, input_format="openai", **options)
    return found


def with_key(key: str, value: Any) -> dict[str, Any]:
    return line({"model": "any", "messages": MESSAGES, key: value})


def test_a_line_is_a_row(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "Why?"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 64}
    row = one(tmp_path, line(body))
    assert (row.id, row.error) == ("a1", None)
    assert images_of(row) == [
        f"{tmp_path}/a.png", "data:image/png;base64,AAAA", "https://example.org/a.png",
    ]  # fmt: skip
    assert row.sampling_params == SamplingParams(temperature=0.0, max_tokens=64)
    assert text_of(one(tmp_path, line())) == "Why?"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"n": 3}, {"n": 3}),
        ({"seed": 5}, {"seed": 5}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"max_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "null"}},
                }
            },
            {"structured_outputs": {"json": {"type": "null"}}},
        ),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"logit_bias": {"50": -100}}, {"logit_bias": {50: -100.0}}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -2}, {"frequency_penalty": -2.0}),
        ({"stream": False}, {}),
        ({"model": "any other"}, {}),
        # A null asks for nothing
        ({"temperature": None, "stop": None, "tools": None, "response_format": None}, {}),
    ],
)
def test_keys_of_the_body_that_are_honored(
    tmp_path: Path, given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    row = one(tmp_path, line({"messages": MESSAGES, **given}))
    assert row.error is None
    defaults = {"temperature": 0.0, "max_tokens": 7}
    assert row.sampling_params == SamplingParams(**(defaults | wanted))


@pytest.mark.parametrize(
    "key",
    [
        "audio", "function_call", "functions", "metadata", "modalities", "parallel_tool_calls",
        "prediction", "prompt", "reasoning_effort", "service_tier", "store",
        "stream_options", "tool_choice", "tools", "top_k", "user", "web_search_options", "Temperature",
    ],
)  # fmt: skip
def test_every_other_key_of_the_body_is_refused(tmp_path: Path, key: str) -> None:
    values: list[Any] = ["x", {}, False, 0]
    for value in values:
        error = error_of(one(tmp_path, with_key(key, value)))
        assert error == ("unknown_key", "parse", f"body must have supported keys, got {key!r}")


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_streams_are_refused(tmp_path: Path, value: object) -> None:
    error = error_of(one(tmp_path, with_key("stream", value)))
    assert error == ("unknown_key", "parse", f"body: stream must be false, got {value!r}")


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        (line(extra=1), "unknown_key", "line must have supported keys, got 'extra'"),
        (line(method="GET"), "schema", "method must be 'POST', got 'GET'"),
        (line(method=None), "schema", "method must be 'POST', got None"),
        (
            line(url="/v1/completions"),
            "schema",
            "url must be v1/chat/completions after a slash, got another one",
        ),
        (line([1]), "schema", "body must be an object, got a list"),
        (line({}), "schema", "body must have 'messages', got none"),
        (line({"messages": []}), "prompt", "messages: must be a list of at least one message"),
        (line(custom_id=1.5), "schema", "the id must be a string or a 64-bit integer, got 1.5"),
        (with_key("logprobs", 3), "sampling", "logprobs must be true or false, got 3"),
        (with_key("top_logprobs", 3), "sampling", "top_logprobs must come with logprobs"),
        (with_key("top_logprobs", 21), "sampling", "must be an integer from 0 to 20, got 21"),
        (with_key("top_logprobs", True), "sampling", "must be an integer from 0 to 20, got True"),
        (with_key("temperature", "hot"), "sampling", "temperature must be a number in"),
        (with_key("n", 0), "sampling", "n must be an integer from 1"),
        (with_key("stop", 3), "sampling", "stop must be a list of strings"),
        (
            line({"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1}),
            "sampling",
            "body must have max_tokens or max_completion_tokens, got both",
        ),
    ],
)
def test_lines_of_another_shape_are_errors(
    tmp_path: Path, row: dict[str, Any], code: str, message: str
) -> None:
    error = error_of(one(tmp_path, row))
    assert error.code == code
    assert message in error.message


def test_a_line_without_an_id_gets_one(tmp_path: Path) -> None:
    assert one(tmp_path, line(custom_id=None)).id == "row-0"
    assert one(tmp_path, line(custom_id=12)).id == 12


def test_model_is_checked_if_asked(tmp_path: Path) -> None:
    assert one(tmp_path, with_key("model", "m"), check_model="m").error is None
    error = error_of(one(tmp_path, with_key("model", "x"), check_model="m"))
    assert error == ("schema", "parse", "body: model must be 'm', got 'x'")
    assert "got None" in error_of(one(tmp_path, line(), check_model="m")).message


def test_columns_of_a_line_can_be_kept(tmp_path: Path) -> None:
    row = one(tmp_path, line(topic="stars"), keep=["topic"])
    assert (row.error, dict(row.keep)) == (None, {"topic": "stars"})


def test_auto_reads_batch_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [line(), line(custom_id="a2")])
    assert [row.id for row in read_rows(path)] == ["a1", "a2"]
    # Read as plain rows, they have unknown keys
    codes = [error_of(row).code for row in read_rows(path, input_format="jsonl")]
    assert codes == ["unknown_key"] * 2
    assert all(row.sampling_params is DEFAULTS for row in read_rows(path))


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (7, "schema", "response_format must be an object, got a number"),
        ({"type": "xml"}, "sampling", "response_format must have a type of text, json_object or"),
        ({}, "sampling", "response_format must have a type"),
        ({"type": "text", "x": 1}, "unknown_key", "response_format must have supported keys"),
        ({"type": "json_schema"}, "sampling", "must have an object at json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "mode": 1}},
            "unknown_key",
            "json_schema must have supported keys, got 'mode'",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}},
            "sampling",
            "json: 'uniqueItems' at # cannot be enforced",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"format": "color"}}},
            "sampling",
            "Unknown format: color",
        ),
    ],
)
def test_response_format_that_cannot_be_honored_is_an_error(
    tmp_path: Path, given: Any, code: str, message: str
) -> None:
    error = error_of(one(tmp_path, with_key("response_format", given)))
    assert error.code == code
    assert message in error.message
