"""Typed text stays text, however it is built, cut and distributed; invalid prompts are refused.

A conversation is compared with an independent rendering of Idefics2's format, in which each image
is one character that no text has. The ids must decode to it, and must have the control ids of the
same conversation with harmless texts.
"""

import json
import re
import unicodedata
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ImageError, PromptError, PromptTooLongError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.prompts.token_library import TokenLibrary
from idefics2_engine.prompts.tokenizer import Tokenizer
from paths import EIGHT_B
from tiny_checkpoint import LATENTS, write_checkpoint

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
CONTROL = ("<unk>", "<s>", "</s>", FAKE, IMAGE, END)
# These are in the private use area, which no strategy draws from
SLOT, TURN = "\ue000", "\ue001"
DOT = Image.new("RGB", (2, 2), "red")
# Every run has the same examples
PROPERTY = settings(derandomize=True, deadline=None)


@cache
def processor(split: bool = False) -> Processor:
    """Return the 8B model's processor with small tiles, whose contents do not matter here."""
    loaded = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split)
    small = replace(loaded.image_config, longest_edge=28, shortest_edge=14)
    return replace(loaded, image_config=small, image_seq_len=LATENTS)


def rendered(messages: list[dict[str, Any]], split: bool) -> str:
    """Write a conversation in Idefics2's format, with images expanded as in transformers."""
    text = ""
    for message in messages:
        content = message["content"]
        text += message["role"].capitalize() + (":" if content[0]["type"] == "image" else ": ")
        text += "".join(SLOT if part["type"] == "image" else part["text"] for part in content)
        text += f"{TURN}\n"
    text += "Assistant:"
    # A space separates an image from a word
    text = re.sub(rf"({SLOT}+)(?=[^\s<{SLOT}{TURN}])", r"\1 ", text)
    tile = FAKE + IMAGE * LATENTS
    tiles = tile * (5 if split else 1)
    text = re.sub(rf"{SLOT}+", lambda slots: tiles * len(slots[0]) + FAKE, text)
    # The tokenizer does not distinguish the two
    text = text.replace("▁", " ")
    # The tokenizer adds this space
    space = "" if text.startswith(" ") else " "
    return "<s>" + space + text.replace(TURN, END)


def look_alikes(token: str, at: int) -> list[str]:
    """Return spellings of ``token`` that a step might confuse with it."""
    at = 1 + at % (len(token) - 1)
    full_width = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token)
    return [
        full_width,
        full_width[0] + token[1:],
        token[:-1] + full_width[-1],
        token.replace("<", "﹤").replace(">", "﹥"),
        token.replace("<", "‹").replace(">", "›"),  # noqa: RUF001
        token.replace("<", "&lt;").replace(">", "&gt;"),
        token.replace("<", "\\u003c").replace(">", "\\x3e"),
        token.replace("<", "<0x3C>"),
        token.replace("i", "ı").replace("a", "а"),  # noqa: RUF001  dotless and Cyrillic
        token.upper(),
        unicodedata.normalize("NFD", token.replace("a", "å")),
        "▁" + token,
        "\u202e" + token[::-1],
        *(
            token[:at] + inserted + token[at:]
            for inserted in (
                "\u200b",
                "\u200d",
                "\u2060",
                "\ufeff",
                "\u00ad",
                "\u0338",
                "\x00",
                " ",
                "▁",
            )
        ),
    ]


tokens = st.sampled_from(CONTROL)
places = st.integers(0, 30)
pieces = st.one_of(
    tokens,
    st.builds(lambda token, i, j: token[min(i, j) : max(i, j)], tokens, places, places),
    st.builds(lambda token, at, n: look_alikes(token, at)[n % 22], tokens, places, places),
    st.sampled_from(["\ufdd0", "\ufdd1", "\ufdd0\ufdd1", "\ufdd1\ufdd0", "<\ufdd0\ufdd1image>", "<\ufdd0image>"]),
    st.sampled_from(["<", ">", "<<", "</", "\n", " ", "User: ", "Assistant:", "{{ 1 }}", "{% if x %}"]),
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=4),
)  # fmt: skip
texts = st.lists(pieces, max_size=5).map("".join)
image_part = st.just({"type": "image"})


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@st.composite
def spread(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Cut a text at random places into parts, and insert images between some of them."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts: list[dict[str, Any]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts.append(text_part(text[start:end]))
        parts += draw(st.lists(image_part, max_size=2)) if draw(st.booleans()) else []
    return parts


messages = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", "system"]),
    st.one_of(
        spread(), st.lists(st.one_of(image_part, texts.map(text_part)), min_size=1, max_size=5)
    ),
)


def harmless(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation with plain words instead of all typed text."""
    return [
        {
            "role": "user",
            "content": [
                text_part("w") if part.get("text") else part for part in message["content"]
            ],
        }
        for message in conversation
    ]


def control_ids(ids: list[int]) -> list[int]:
    return [id for id in ids if id in processor().tokenizer.control_ids]


@settings(PROPERTY, max_examples=500)
@given(conversation=st.lists(messages, min_size=1, max_size=3), split=st.booleans())
def test_typed_text_stays_text_and_images_keep_their_place(
    conversation: list[dict[str, Any]], split: bool
) -> None:
    parts = [part for message in conversation for part in message["content"]]
    images = [DOT] * parts.count({"type": "image"})
    got = processor(split).chat(conversation, images)
    assert control_ids(got.token_ids) == control_ids(
        processor(split).chat(harmless(conversation), images).token_ids
    )
    decoded = processor().tokenizer.decode(got.token_ids, skip_special_tokens=False)
    assert decoded == rendered(conversation, split)
    assert got.prompt.count(IMAGE) >= len(images) == len(got.tiles) / (5 if split else 1)


@settings(PROPERTY, max_examples=700)
@given(token=tokens, cuts=st.lists(places, min_size=1, max_size=6), between=st.booleans())
def test_token_split_over_parts_and_messages_is_text(
    token: str, cuts: list[int], between: bool
) -> None:
    places = sorted({cut % len(token) for cut in cuts} - {0})
    parts = [token[i:j] for i, j in zip([0, *places], [*places, len(token)], strict=True)]
    image = {"type": "image"}
    one: list[dict[str, Any]] = [{"role": "user", "content": [text_part(part) for part in parts]}]
    # An image follows each part
    if between:
        one[0]["content"] = [either for part in parts for either in (text_part(part), image)]
    several = [{"role": "user", "content": part} for part in parts]
    for conversation, images in ((one, len(parts) * between), (several, 0)):
        ids = processor().chat(conversation, [DOT] * images).token_ids
        ends = [32002] * len(conversation)
        assert control_ids(ids) == [1, *([32000, *[32001] * LATENTS, 32000] * images), *ends]


@cache
def normalizing() -> Tokenizer:
    """Return a tokenizer whose normalizer turns full-width brackets into plain ones."""
    description = json.loads((EIGHT_B / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "NFKC"}
    for token in description["added_tokens"]:
        token["normalized"] = True
    return Tokenizer(description, json.loads((EIGHT_B / "tokenizer_config.json").read_text()))


@settings(PROPERTY, max_examples=300)
@given(text=texts, before=st.sampled_from(["", IMAGE, "User: "]))
@example(text="＜image＞", before="")  # noqa: RUF001
@example(text="＜image>", before=IMAGE)  # noqa: RUF001
def test_normalizer_creates_no_control_token(text: str, before: str) -> None:
    tokenizer = normalizing()
    ids = tokenizer.encode_marked(before + tokenizer.mark_typed(text), add_bos=False)
    wanted = [tokenizer.image_id] if before == IMAGE else []
    assert [id for id in ids if id in tokenizer.control_ids] == wanted


# Tests of invalid prompts

NO_TEXT = [None, 7, 1.5, b"bytes", ["a"], {"a": 1}, True, np.array(["a"])]
HALVES = ["\ud800", "a\udfff", "\udc00\ud800", "<image>\ud83d"]


@pytest.mark.parametrize("text", NO_TEXT, ids=repr)
def test_values_that_are_not_text_are_refused(text: Any) -> None:
    for call in (
        lambda: processor().prompt(text),
        lambda: processor().padded([text], [[]]),
        lambda: processor().chat([{"role": "user", "content": [{"type": "text", "text": text}]}]),
        lambda: processor().chat([{"role": text, "content": "a"}]),
        lambda: processor().chat([text]),
        lambda: processor().chat(text),
    ):
        with pytest.raises(PromptError, match=r"must be"):
            call()
    # A list is valid as a list of parts
    if not isinstance(text, list):
        missing = "must be a dict with 'role' and 'content'"
        wrong = missing if text is None else "content must be"
        with pytest.raises(PromptError, match=rf"messages\[0\]: {wrong}"):
            processor().chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("text", HALVES, ids=ascii)
def test_half_surrogate_pair_is_refused_with_its_position(text: str) -> None:
    good = {"role": "user", "content": "a"}
    part = {"type": "text", "text": text}
    half = "must be Unicode characters, got half of a surrogate pair at"
    with pytest.raises(
        PromptError, match=f"^text: {half} {len(text) - 1 if text[0] != chr(0xDC00) else 0}$"
    ):
        processor().prompt(text)
    with pytest.raises(PromptError, match=rf"^texts\[1\]: {half}"):
        processor().padded(["a", text], [[], []])
    with pytest.raises(PromptError, match=rf"^messages\[1\]: content\[0\]: {half}"):
        processor().chat([good, {"role": "user", "content": text}])
    with pytest.raises(PromptError, match=rf"^messages\[0\]: content\[1\]: {half}"):
        processor().chat([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    with pytest.raises(PromptError, match=r"^messages\[1\]: role must be 'system', 'user' or"):
        processor().chat([good, {"role": text, "content": "a"}])


def test_surrogate_pair_is_one_character() -> None:
    assert processor().prompt("🦩").token_ids == processor().prompt("\U0001f9a9").token_ids


def test_empty_texts() -> None:
    assert processor().prompt("").token_ids == [1]
    assert processor().padded(["", "a"], [[], []])["input_ids"].tolist() == [[1, 0], [1, 264]]
    content: list[dict[str, Any]] = [{"type": "text", "text": ""}, {"type": "text", "text": ""}]
    ids = processor().chat([{"role": "user", "content": content}]).token_ids
    assert processor().tokenizer.decode(ids, False) == "<s> User: <end_of_utterance>\nAssistant:"


MEGABYTE = {
    "a word": "a" * 10**6,
    "brackets": "<" * 10**6,
    "tokens": "<end_of_utterance>" * 55_556,
    "marks": "\ufdd0\ufdd1" * 166_667,
    "three bytes each": "漢" * 333_334,
    "no space": "<s>é{{}}\n" * 100_000,
}


@pytest.mark.parametrize("name", MEGABYTE)
def test_megabyte_of_typed_tokens_stays_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is encoded once, and marks make it at most three times as long."""
    text = MEGABYTE[name]
    assert len(text.encode()) >= 10**6
    given: list[int] = []
    encode = TokenLibrary.encode

    def recording_encode(library: TokenLibrary, text: str) -> list[int]:
        given.append(len(text))
        return encode(library, text)

    monkeypatch.setattr(TokenLibrary, "encode", recording_encode)
    ids = processor().chat([{"role": "user", "content": text}]).token_ids
    assert len(given) == 1
    assert given[0] < 3 * len(text) + 100
    assert control_ids(ids) == [1, 32002]
    decoded = processor().tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == f"<s> User: {text}<end_of_utterance>\nAssistant:"


def test_megabyte_of_slots_is_refused_before_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    tried = processor()
    monkeypatch.setattr(TokenLibrary, "encode", never)
    monkeypatch.setattr("idefics2_engine.prompts.processor.expand_placeholders", never)
    with pytest.raises(PromptError, match="one <image> for each image, wanted 1, got 142858"):
        tried.prompt(IMAGE * 142_858, [DOT])


# Tests of the length of the context

LENGTH = 40


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Load a tiny random model with the real tokenizer and a context of ``LENGTH`` tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, max_positions=LENGTH)
    return LLM(folder, device="cpu", dtype="float32")


def of_length(kind: str, length: int) -> dict[str, Any]:
    """Return arguments of ``generate`` or ``chat`` whose prompt has ``length`` tokens."""
    words, image = " a" * length, {"image": DOT}
    match kind:
        case "ids":
            return {"prompts": {"prompt_token_ids": [5] * length}}
        case "raw":
            return {"prompts": words[: 2 * (length - 1)].removeprefix(" ")}
        case "raw with an image":
            words = words[: 2 * (length - 1 - LATENTS - 2)]
            return {"prompts": {"prompt": IMAGE + words, "multi_modal_data": image}}
        case "chat":
            content: list[Any] = [text_part(words[: 2 * (length - 8)].removeprefix(" "))]
        case _:
            words = words[: 2 * (length - 8 - LATENTS - 2)]
            content = [{"type": "image", **image}, text_part(words)]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("kind", ["ids", "raw", "raw with an image", "chat", "chat with an image"])
def test_prompts_at_the_context_length_and_over(llm: LLM, kind: str) -> None:
    """The longest prompt leaves one token of the context.

    A longer one is refused and does not affect other requests.
    """

    def answer(length: int) -> list[Any]:
        arguments = of_length(kind, length)
        call = llm.generate if "prompts" in arguments else llm.chat
        return call(**arguments, sampling_params=SamplingParams(max_tokens=5, ignore_eos=True))

    (output,) = answer(LENGTH - 1)
    assert len(output.prompt_token_ids) == LENGTH - 1
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"
    for length in (LENGTH, LENGTH + 1):
        with pytest.raises(PromptTooLongError, match=f"within 40 tokens, got {length}") as caught:
            answer(length)
        assert (caught.value.got, caught.value.limit) == (length, LENGTH - 1)
        assert not llm.engine.has_work
    both = [of_length(kind, n) for n in (5 + 8 + LATENTS, LENGTH)]
    name = "prompts" if "prompts" in both[0] else "messages"
    call = llm.generate if name == "prompts" else llm.chat
    with pytest.raises(PromptTooLongError):
        call([one[name] for one in both])
    assert not llm.engine.has_work


def test_megabyte_is_too_long(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.chat([{"role": "user", "content": MEGABYTE["a word"]}])


def test_invalid_calls_of_the_engine_are_refused(llm: LLM) -> None:
    for prompt in (
        None,
        7,
        ["a", None],
        [None],
        {"prompt": None},
        {"prompt": "\ud800"},
        b"a",
        [b"a"],
    ):
        with pytest.raises(PromptError, match="must be"):
            llm.generate(prompt)  # type: ignore[arg-type]
    wrong: list[Any] = [None, 7, [None], [["a"]], [[]], "a", [{"role": "user", "content": None}]]
    for not_messages in wrong:
        with pytest.raises(PromptError, match="must be"):
            llm.chat(not_messages)
    for either in (None, 7, [], [None], b"a"):
        with pytest.raises(PromptError, match="must be"):
            next(llm.stream(either))  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        llm.generate({"prompt": IMAGE, "multi_modal_data": {"image": None}})
    assert not llm.engine.has_work


def test_empty_prompts(llm: LLM) -> None:
    """An empty text becomes ``<s>``, which the model continues; an empty token list is refused."""
    (output,) = llm.generate("", SamplingParams(max_tokens=2, ignore_eos=True))
    assert output.prompt_token_ids == [1]
    assert len(output.outputs[0].token_ids) == 2
    with pytest.raises(PromptError, match="at least one token, got none"):
        llm.generate({"prompt_token_ids": []})
