"""Several kinds of tokenizers with the same control tokens, as parsed ``tokenizer.json`` files."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import tokenizers

from paths import EIGHT_B

CONTROL = (
    "<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"
)  # fmt: skip


@cache
def description() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((EIGHT_B / "tokenizer.json").read_text())
    return parsed


def legacy_description() -> dict[str, Any]:
    """Return the tokenizer as older releases saved it, with spaces in the normalizer."""
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    return {**description(), "normalizer": normalizer, "pre_tokenizer": None}


def normalized_description() -> dict[str, Any]:
    """Return the tokenizer with control tokens that are matched after normalization."""
    added = [{**token, "normalized": True} for token in description()["added_tokens"]]
    return {**description(), "added_tokens": added}


def byte_level_description() -> dict[str, Any]:
    """Return a tokenizer whose pieces are bytes in GPT-2's alphabet."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*CONTROL, *alphabet, "Ġa", "he"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags} for i, token in enumerate(CONTROL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [["Ġ", "a"], ["h", "e"]],
        },
    }  # fmt: skip


DESCRIPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "8b": description,
    "legacy": legacy_description,
    "normalized": normalized_description,
    "byte level": byte_level_description,
}
SETTINGS = json.loads((EIGHT_B / "tokenizer_config.json").read_text())
