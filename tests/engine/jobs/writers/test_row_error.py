"""Errors of rows: stages, and what a message must not have."""

from pathlib import Path

import pytest

from idefics2_engine import errors
from idefics2_engine.errors import (
    ConfigError,
    ImageError,
    InternalError,
    PromptTooLongError,
    RequestFailedError,
)
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.writers.row_error import STAGES, clean_message, row_error_of


def test_errors_have_stages() -> None:
    assert row_error_of(ImageError("images[0]: no")) == RowError("image", "media", "images[0]: no")
    assert row_error_of(PromptTooLongError(9, 8)).stage == "prepare"
    assert row_error_of(InternalError("prompt: could not")).stage == "engine"


def test_every_error_of_a_row_has_a_stage() -> None:
    elsewhere = {"bad_input", "config", "checkpoint"}
    codes = {one.code for one in vars(errors).values() if hasattr(one, "code")}
    assert codes - elsewhere <= STAGES.keys()
    assert set(STAGES.values()) == {"parse", "prepare", "media", "engine"}


def test_code_that_no_row_has_is_internal() -> None:
    assert row_error_of(ConfigError("a file")) == RowError("internal", "engine", "a file")


def test_number_of_a_request_is_not_in_the_message() -> None:
    said = [
        row_error_of(RequestFailedError(f"request {number}: the logits are not finite"))
        for number in (3, 99)
    ]
    assert said[0] == said[1]
    assert said[0].message == "the logits are not finite"


@pytest.mark.parametrize(
    ("message", "clean"),
    [
        ("prompt must be text or a mapping, got int", None),
        ("images[1]: must have at most 9 pixels, got 4 x 3", None),
        ("images[1]: (H, W, C) or (C, H, W), 1/2 of </s> and image/png", None),
        ("max_tokens must be above 0, got {'a': 1}", None),
        ("a.jpg: cannot be read as an image: no such file or directory", None),
        ("/data/in/sub dir/a.jpg: cannot be read", "sub dir/a.jpg: cannot be read"),
        ("images[0]: /data/in/a.jpg: no", "images[0]: a.jpg: no"),
        ("/home/ann b/key.png: must lie below", "…/key.png: must lie below"),
        ("images[2]: /etc/shadow: no", "images[2]: …/shadow: no"),
        ("got '/srv/my pictures/a.png' and (/tmp/b.png)", "got '…/a.png' and (…/b.png)"),
        (r"C:\Users\ann\a.png: no", "…/a.png: no"),
        ("got 'https://u:pw@h.org:8/a/b.png?key=1#x'", "got 'https://h.org:8/…'"),
        ("https://h.org: no", "https://h.org: no"),
        ("got 'file:///etc/passwd'", "got 'file:///…'"),
        ("got {'url': 'data:image/png;base64,iVBORw0KG…'}", "got {'url': 'data:…'}"),
        (r"got {'bytes': b'\x89PNG\r\n'}", "got {'bytes': bytes}"),
        ("got <object at 0x7f31a0b2c3d0>", "got <object at 0x…>"),
        ("got a.png?sig=abc&x=1", "got a.png?…"),
        ("got {'api_key': 'abc', 'b': 1}", "got {'(secret)', 'b': 1}"),
        ("got Bearer abc.def", "got (secret)"),
        ("two\nlines\x1b[31m and \ud800", "two lines [31m and"),
        ("x" * 600, "x" * 499 + "…"),
    ],
)
def test_messages_are_clean(message: str, clean: str | None) -> None:
    got = clean_message(message, Path("/data/in"))
    assert got == (message if clean is None else clean)
    assert clean_message(got, Path("/data/in")) == got
