"""Lines of JSON: what is strict JSON is read as ``json`` reads it, and everything else is an error."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.json_line import MOST_LEVELS, parse_line

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
def test_objects_are_read_as_written(value: dict[str, Any], is_ascii: bool) -> None:
    line = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        line.decode()
    except UnicodeDecodeError:
        # A lone surrogate can only be escaped
        line = json.dumps(value).encode()
    assert parse_line(line) == value


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (b'{"a": 1', "json", "line must be JSON, got: expecting ',' delimiter at character 8"),
        (b'{"a": 1} x', "json", "line must be JSON, got: extra data at character 10"),
        (b'{"a": "x\ry"}', "json", "line must be JSON, got: invalid control character at"),
        (b'{"a": NaN}', "json", "numbers must be finite, got NaN"),
        (b'{"a": [-Infinity]}', "json", "numbers must be finite, got -Infinity"),
        (b'{"a": 1e999}', "json", "numbers must be finite, got 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "json", "got a number that is too long"),
        (b'{"a": "\xe4"}', "encoding", "line must be UTF-8, got another byte after 7 bytes"),
        (b'\xff\xfe{\x00"\x00', "encoding", "got another byte after 0 bytes"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate_key", "the key 'a' must be there once"),
        (b'{"a": [{"b": 1, "b": 1}]}', "duplicate_key", "the key 'b' must be there once"),
        (b"[1]", "schema", "line must be a JSON object, got a list"),
        (b"null", "schema", "line must be a JSON object, got null"),
        (b'"a"', "schema", "line must be a JSON object, got a string"),
        (b"1.5", "schema", "line must be a JSON object, got a number"),
    ],
)
def test_bad_lines_say_what_is_wrong(line: bytes, code: str, message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        parse_line(line)
    error = caught.value.row_error
    assert (error.code, error.stage) == (code, "parse")
    assert message in error.message


def test_lone_surrogates_are_kept() -> None:
    assert parse_line(rb'{"a": "\ud800"}') == {"a": "\ud800"}


@pytest.mark.parametrize("levels", [MOST_LEVELS + 1, 900, 10_000, 100_000])
@pytest.mark.parametrize("end", [b"", b"]"])
def test_deep_lines_are_bad_at_any_depth_of_the_stack(levels: int, end: bytes) -> None:
    line = b'{"a": ' + b"[" * (levels - 1) + end * (levels - 1) + b"}" * len(end)

    def parse() -> str:
        with pytest.raises(BadRowError) as caught:
            parse_line(line)
        return caught.value.message

    def deep(number: int, call: Callable[[], str]) -> str:
        return deep(number - 1, call) if number else call()

    messages = {deep(number, parse) for number in (0, sys.getrecursionlimit() // 2)}
    assert messages == {f"line must have at most {MOST_LEVELS} levels, got more"}


def test_many_brackets_that_are_not_deep_are_read() -> None:
    value = {"a": [[], {}] * 500, "b": '[{"\\' * 500, "c": "[" * 100}
    assert parse_line(json.dumps(value).encode()) == value
    levels = MOST_LEVELS - 1
    assert parse_line(b'{"a": ' + b"[" * levels + b"]" * levels + b"}")
