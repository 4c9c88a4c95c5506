"""The tokenizer of the caller, as the engine reads the text of answers."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any


class NoTexts:
    """No tokenizer: nothing asked for the text of an answer."""

    control_ids: frozenset[int] = frozenset()
    byte_values: Mapping[int, bytes] = {}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return no text."""
        return ""


class Texts(NoTexts):
    """The texts of a tokenizer of transformers, with those of control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def byte_values(self) -> Mapping[int, bytes]:  # type: ignore[override]
        """Bytes of the pieces that stand for one byte each, by id."""
        known = self._tokenizer.get_vocab()
        pieces = {byte: known.get(f"<0x{byte:02X}>") for byte in range(256)}
        return {id: bytes([byte]) for byte, id in pieces.items() if id is not None}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``."""
        text: str = self._tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text
