"""Conversations in every accepted shape, and the errors of all others."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from idefics2_engine.errors import PromptError
from idefics2_engine.prompts.messages import read_messages


def test_every_shape_of_message_is_accepted() -> None:
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
                {"type": "image_url", "image_url": {"url": "data:e", "detail": "low"}},
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
    # The caller's messages are not changed
    assert len(messages[1]["content"][2]) == 2


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
        ([{"role": "user", "content": None}], r"messages\[0\]: .* got \['role'\]"),
        ([{"role": None, "content": "x"}], r"messages\[0\]: .* got \['content'\]"),
        *(
            (
                [{"role": "user", "content": "x"}, {"role": role, "content": "x"}],
                rf"messages\[1\]: role must be 'system', 'user' or 'assistant', got '{role}'",
            )
            for role in ("User", "human", "tool", "<image>", " user")
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": []}],
            r"messages\[1\]: content",
        ),
        *(
            ([{"role": "user", "content": ["x", part][1:]}], r"messages\[0\]: content\[0\]: must")
            for part in (
                "text",
                {"type": "text"},
                {"type": "text", "text": 3},
                {"type": "text", "text": "a", "more": 1},
                {"type": "audio", "audio": "a.wav"},
                {"type": "text", "text": None},
                {"type": "text", "text": None, "image": "a.png"},
                {"type": "image", "image": "a", "url": "b"},
                {"type": "image", "image": "a", "text": ""},
                {"type": "image_url"},
                {"type": "image_url", "image_url": None},
                {"type": "image_url", "image_url": {"url": None}},
                {"type": "image_url", "image_url": {"url": "a", "more": 1}},
                {"type": "image_url", "image_url": 7},
                {"type": None, "text": "a"},
                {"text": "a"},
            )
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "wanted 0, got 1"),
    ],
)
def test_other_shapes_of_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_messages(messages)


def filled_up(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a row as in ``datasets``, with the keys of all rows and ``None`` for absent values."""
    return {key: values.get(key) for key in keys}


def test_messages_of_datasets_are_accepted() -> None:
    def part(**values: Any) -> dict[str, Any]:
        return filled_up(values, "type", "text", "image", "image_url", "path")

    stored = {"bytes": b"png", "path": None}
    url = {"url": "d.png", "detail": None}
    content = [
        part(type="image"),
        part(type="text", text="a"),
        part(type="image", image=stored),
        part(type="image", path="c.png"),
        part(type="image_url", image_url=url),
    ]
    rows: list[dict[str, Any]] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "b"},
    ]
    messages = [filled_up(row, "role", "content", "name", "tool_calls") for row in rows]
    turns, sources = read_messages(messages, [b"1"])
    assert sources == [b"1", stored, "c.png", "d.png"]
    plain: list[dict[str, Any]] = [
        {"type": "image"},
        {"type": "text", "text": "a"},
        {"type": "image", "image": stored},
        {"type": "image", "path": "c.png"},
        {"type": "image_url", "image_url": "d.png"},
    ]
    same = [{**rows[0], "content": plain}, rows[1]]
    assert read_messages(same, [b"1"]) == (turns, sources)


def test_image_of_none_uses_the_next_image() -> None:
    part = {"type": "image", "image": None}
    _, sources = read_messages([{"role": "user", "content": [part, part]}], [b"1", b"2"])
    assert sources == [b"1", b"2"]


def test_conversation_may_be_a_tuple_and_errors_use_its_name() -> None:
    turns, _ = read_messages(({"role": "user", "content": ({"type": "text", "text": "a"},)},))
    assert turns == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    with pytest.raises(PromptError, match=r"^messages\[1\]\[0\]: role must be"):
        read_messages([{"role": "x", "content": "a"}], name="messages[1]")
    with pytest.raises(PromptError, match=r"^messages\[1\]: must be a list"):
        read_messages([], name="messages[1]")


class Failing(Mapping[str, Any]):
    """A mapping that looks valid until it is read."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def __getitem__(self, key: str) -> Any:
        raise OSError("secret")

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@pytest.mark.parametrize(
    "message",
    [
        Failing("role", "content"),
        {"role": "user", "content": [Failing("type", "text")]},
        {"role": "user", "content": [{"type": "image_url", "image_url": Failing("url")}]},
    ],
)
def test_exception_while_reading_a_message_is_a_prompt_error(message: Any) -> None:
    good = {"role": "user", "content": "a"}
    with pytest.raises(PromptError, match=r"^messages\[1\]: reading it raised OSError$"):
        read_messages([good, message])


def test_leftover_images_are_refused() -> None:
    with pytest.raises(PromptError, match="wanted 2, got 1"):
        read_messages([{"role": "user", "content": [{"type": "image"}]}], [b"1", b"2"])
