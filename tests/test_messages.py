"""Conversations in every accepted shape, and what is said about the others."""

from typing import Any

import pytest

from idefics2_engine.errors import PromptError
from idefics2_engine.messages import read_messages


def test_messages_in_every_shape() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "a"},
                {"type": "image", "image": "b.png"},
                {"type": "image", "url": "c.png"},
                {"type": "image", "path": "d.png"},
                {"type": "image_url", "image_url": {"url": "data:e"}},
                {"type": "image"},
            ],
        },
    ]
    turns, sources = read_messages(messages, [b"1", b"2"])
    assert sources == [b"1", "b.png", "c.png", "d.png", "data:e", b"2"]
    image = {"type": "image"}
    text = {"type": "text", "text": "a"}
    assert turns == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [image, text, image, image, image, image, image]},
    ]
    assert len(messages[1]["content"][2]) == 2  # the caller's messages are left alone


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: must be a list of at least one message"),
        ("hi", "messages: must be a list"),
        ({"role": "user", "content": "x"}, "messages: must be a list"),
        (["hi"], r"messages\[0\]: must be a dict with 'role' and 'content', got str"),
        ([{"role": "user"}], r"messages\[0\]: .* got \['role'\]"),
        ([{"role": "user", "content": "x", "name": "y"}], r"messages\[0\]: .* 'name'"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]: role must be"),
        ([{"role": "", "content": "x"}], r"messages\[0\]: role must be"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content must be"),
        ([{"role": "a", "content": "x"}, {"role": "b", "content": []}], r"messages\[1\]: content"),
        *(
            ([{"role": "user", "content": ["x", part][1:]}], r"messages\[0\]: content\[0\]: must")
            for part in (
                "text",
                {"type": "text"},
                {"type": "text", "text": 3},
                {"type": "text", "text": "a", "more": 1},
                {"type": "audio", "audio": "a.wav"},
                {"type": "image", "image": None},
                {"type": "image", "image": "a", "url": "b"},
                {"type": "image_url", "image_url": "a.png"},
                {"text": "a"},
            )
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "wanted 0, got 1"),
    ],
)
def test_messages_in_another_shape_are_an_error(messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_messages(messages)


def test_leftover_images_are_an_error() -> None:
    with pytest.raises(PromptError, match="wanted 2, got 1"):
        read_messages([{"role": "user", "content": [{"type": "image"}]}], [b"1", b"2"])
