"""Bounds on how much a tokenizer's steps can lengthen a text.

A short ``tokenizer.json`` can turn two characters into millions of ids, by a long replacement or by
a series of doublings. Each step's growth is bounded by its type, and that of a sequence by the
product.
"""

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

# A Sequence has its steps at one of these keys
_CHILDREN = ("normalizers", "pretokenizers", "decoders")
# Most characters that one character becomes. ByteLevel makes one of each byte and may add a space
_FIXED = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "Nmt": 1, "Strip": 1, "StripAccents": 1,
    "BertNormalizer": 36, "ByteLevel": 5, "Metaspace": 2,
    "BertPreTokenizer": 1, "CharDelimiterSplit": 1, "Digits": 1, "FixedLength": 1, "Punctuation": 1, "Split": 1,
    "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1,
    "BPEDecoder": 2, "ByteFallback": 1, "CTC": 2, "Fuse": 1, "WordPiece": 2,
}  # fmt: skip


def leaves(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the elementary steps of ``step``, a well-formed part of ``tokenizer.json``."""
    if step is None:
        return
    if not isinstance(step, Mapping):
        # The library reads some steps from a list of their values as well
        yield {"type": None}
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for key in _CHILDREN:
        for child in step.get(key, ()):
            yield from leaves(child)


def growth(step: Mapping[str, Any] | None) -> float:
    """Return the most characters that ``step`` makes of one; infinity for an unknown type."""
    return math.prod(_growth(leaf) for leaf in leaves(step))


def _growth(leaf: Mapping[str, Any]) -> float:
    match leaf.get("type"):
        case "Replace":
            content, removed = len(leaf["content"]), len(leaf["pattern"].get("String", ""))
            # A regular expression, like an empty text, may match between any two characters
            return max(1.0, content / removed) if removed else 1.0 + content
        case "Prepend":
            return 1.0 + len(leaf["prepend"])
        case "Precompiled":
            return float(_longest_text(leaf["precompiled_charsmap"]))
        case kind:
            return float(_FIXED.get(str(kind), math.inf))


def _longest_text(charsmap: str) -> int:
    """Return the bytes of the longest text in SentencePiece's table, which follows the trie."""
    table = base64.b64decode(charsmap)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, *(len(text) for text in texts.split(b"\0")))
