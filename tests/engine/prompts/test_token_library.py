"""The only use of ``tokenizers``: panics and errors become errors of this package.

Interrupts reach the caller, and no tokenizer multiplies the length of a text.
"""

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ConfigError, PromptError, SamplingError
from idefics2_engine.prompts.text_growth import growth
from idefics2_engine.prompts.token_library import TokenLibrary
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.sampling.bad_words import bad_words_ids
from tiny_checkpoint import edit_json, write_checkpoint
from tokenizer_kinds import SETTINGS, byte_level_description

# On this text Oniguruma gives up, and the library panics
CATASTROPHE = "a" * 28 + "!"
REGEX = {"Regex": "(a+)+$"}
SPLIT = {"type": "Split", "pattern": REGEX, "behavior": "Isolated", "invert": False}


def described(**changes: Any) -> dict[str, Any]:
    return byte_level_description() | changes


def after_split() -> dict[str, Any]:
    """Return a tokenizer that panics on ``CATASTROPHE``."""
    plain = byte_level_description()
    steps = [SPLIT, {**plain["pre_tokenizer"], "use_regex": False}]
    return {**plain, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def in_turn(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [*steps]}


def test_panic_is_a_prompt_error() -> None:
    tokenizer = Tokenizer(after_split(), SETTINGS)
    for call in (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_marked):
        with pytest.raises(PromptError, match=r"^text: must be one that .* can read: Onig: Regex"):
            call(CATASTROPHE)
        assert tokenizer.decode(call("hello")) == "hello", "the next one is answered"


def test_panic_on_a_bad_word_is_a_sampling_error() -> None:
    tokenizer = Tokenizer(after_split(), SETTINGS)
    with pytest.raises(SamplingError, match=r"bad_words: 'aaaa.*': text: must be one"):
        bad_words_ids(["red", CATASTROPHE], tokenizer)


def test_texts_of_a_batch_with_a_panic_are_tokenized_alone() -> None:
    tokenizer = Tokenizer(after_split(), SETTINGS)
    wanted = tokenizer.encode("hello")
    tokenizer.prepare(["hello", CATASTROPHE])
    assert tokenizer.encode("hello") == wanted
    with pytest.raises(PromptError, match="text: must be one"):
        tokenizer.encode(CATASTROPHE)


def test_bare_exception_is_a_prompt_error() -> None:
    """A word that the model does not know raises an error if the tokenizer has no token for it."""
    words: dict[str, Any] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    library = TokenLibrary(
        described(model=words, added_tokens=[], pre_tokenizer=None, decoder=None)
    )
    assert library.encode("a") == [0]
    with pytest.raises(PromptError, match=r"can read: WordLevel error: Missing \[UNK\] token"):
        library.encode("b")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, TimeoutError, Exception])
def test_other_exceptions_pass_through(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt, or an error of a signal handler, reaches the caller."""
    real, fails = tokenizers.Tokenizer, False

    class Failing:
        """The library's tokenizer, which can be made to fail."""

        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        @staticmethod
        def from_str(description: str) -> Any:
            if fails:
                raise raised
            return Failing(real.from_str(description))

        def __getattr__(self, name: str) -> Any:
            if fails:
                raise raised
            return getattr(self.tokenizer, name)

    monkeypatch.setattr(tokenizers, "Tokenizer", Failing)
    library = TokenLibrary(described())
    fails = True
    with pytest.raises(raised):
        library.encode("a")
    with pytest.raises(raised):
        library.decode([1], skip_special_tokens=False)
    with pytest.raises(raised):
        TokenLibrary(described())


def test_panic_fails_its_row_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    metaspace = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    steps = {"type": "Sequence", "pretokenizers": [SPLIT, metaspace]}
    edit_json(tmp_path / "tokenizer.json", pre_tokenizer=steps)
    llm = LLM(tmp_path, device="cpu")
    one = SamplingParams(max_tokens=1)
    chat = [{"role": "user", "content": CATASTROPHE}]
    barred = SamplingParams(max_tokens=1, bad_words=[CATASTROPHE])
    rows: list[Any] = ["a", CATASTROPHE, "b", chat, ("c", barred), "d"]
    outputs = {int(output.request_id): output for output in llm.iterate(rows, one)}
    assert [*sorted(outputs)] == [*range(6)]
    codes = [getattr(outputs[i].error, "code", None) for i in range(6)]
    assert codes == [None, "prompt", None, "prompt", "sampling", None]
    with pytest.raises(PromptError, match="can read"):
        llm.generate(["a", CATASTROPHE], one)
    assert llm.generate("a", one)[0].finished


# Tests of loading


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The library panics on this one
        ({"normalizer": {"type": "Precompiled"}}, "is not a tokenizer: Precompiled"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, "is not a"),
        ({"normalizer": replace("a", "b" * 10**6)}, "characters of one, got up to 1e\\+06"),
        ({"normalizer": replace("", "b" * 64)}, "got up to 65"),
        ({"normalizer": in_turn(*[replace("a", "aa")] * 21)}, "got up to 2.09715e\\+06"),
        ({"normalizer": in_turn(*[replace("a", "aa")] * 1100)}, "got up to inf"),
        ({"normalizer": in_turn(in_turn(replace("a", "bb" * 30)), replace("b", "cc"))}, "to 120"),
        ({"normalizer": {"type": "Prepend", "prepend": "b" * 64}}, "normalizer must .* up to 65"),
        ({"normalizer": {"prepend": "b" * 10**6}}, "normalizer must make .* up to inf"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "b" * 99}},
            "got up to 100",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [byte_level_description()["pre_tokenizer"]] * 20,
                }
            },
            "pre_tokenizer must make at most 64 characters of one",
        ),
        ({"decoder": replace("a", "b" * 99)}, "decoder must make at most 64 characters of one"),
        (
            {"decoder": {"type": "Replace", "pattern": REGEX, "content": "b"}},
            "decoder must replace texts and no expressions",
        ),
        (
            {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
            "decoder must strip nothing from the end",
        ),
    ],
)
def test_invalid_tokenizers_are_refused_at_load(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^tokenizer.json: .*{message}"):
        Tokenizer(described(**changes), SETTINGS)


def test_growth_of_a_sentencepiece_table_is_its_longest_text() -> None:
    trie = bytes(16)
    texts = b"fi\0" + b"x" * 100 + b"\0\0"
    table = len(trie).to_bytes(4, "little") + trie + texts
    charsmap = base64.b64encode(table).decode()
    assert growth({"type": "Precompiled", "precompiled_charsmap": charsmap}) == 100
    assert growth({"type": "Precompiled", "precompiled_charsmap": ""}) == 1


@pytest.mark.parametrize(
    "step",
    [
        *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "StripAccents", "ByteLevel")),
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        in_turn({"type": "NFKC"}, {"type": "Lowercase"}),
        {"type": "Prepend", "prepend": "▁"},
        replace("ab", "cdef"),
    ],
    ids=str,
)  # fmt: skip
def test_characters_grow_by_at_most_the_bound(step: dict[str, Any]) -> None:
    normalizer = tokenizers.Tokenizer.from_str(json.dumps(described(normalizer=step))).normalizer
    assert growth(step) <= 64
    for character in map(chr, range(0x20000)):
        changes = unicodedata.decomposition(character) or character.lower() != character
        if changes or (ord(character) % 97 == 0 and unicodedata.category(character) != "Cs"):
            assert len(normalizer.normalize_str(character)) <= growth(step)
