"""The one user of ``tokenizers``: what it builds is bounded, and its failures are our errors.

The library raises bare ``Exception``, and what it did not foresee is a panic of Rust, which in
Python is no ``Exception``. Nothing else that comes out of a call is touched: an interrupt, or what
a signal's handler raises, is the caller's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from idefics2_engine.errors import ConfigError, Idefics2Error, PromptError, short_repr
from idefics2_engine.prompts.text_growth import growth, leaves

_MOST_GROWTH = 64  # characters of one; NFKC and lower case together may make 54


class TokenLibrary:
    """A tokenizer of the library."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        """Build from the parsed ``tokenizer.json``.

        Raises:
            ConfigError: The library cannot build or use it, it could make far more of a text than
                was given, or it has a decoder that fails on some texts.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except BaseException as error:
            raise _unusable(error) from None
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            _check_growth(part, description.get(part))
        _check_decoder(description.get("decoder"))
        # Added tokens and gaps between ids included
        ids = sorted(self._tokenizer.get_vocab().values())
        self.vocab_size: int = 1 + ids[-1]
        self.added_tokens: dict[int, tokenizers.AddedToken] = (
            self._tokenizer.get_added_tokens_decoder()
        )
        self._spelled: dict[int, int] = {}  # ids of other spellings of added tokens, to the tokens'
        try:  # the parts that are looked into no sooner
            self.prefix: list[int] = self._tokenizer.encode("").ids  # what begins and ends a text
            self._tokenizer.decode([])
            self._tokenizer.decode(ids, skip_special_tokens=False)
        except BaseException as error:
            raise _unusable(error) from None

    def add_spelling(self, id: int, spelling: str) -> None:
        """Find ``spelling`` as the added token ``id`` is found, and take it for that."""
        token = self.added_tokens[id]
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
        added = tokenizers.AddedToken(spelling, normalized=False, special=False, **flags)
        self._tokenizer.add_tokens([added])
        spelled = self._tokenizer.token_to_id(spelling)
        assert spelled is not None
        self._spelled[spelled] = id

    def id_of(self, token: str) -> int | None:
        """Return the id of ``token``."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without what begins and ends a text."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _translated(
                error, PromptError, "text: must be one that this tokenizer can read"
            ) from None
        return [self._spelled.get(id, id) for id in ids] if self._spelled else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of ``ids``."""
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _translated(
                error, PromptError, "token_ids: must be ones that this tokenizer can write"
            ) from None
        return text


def _unusable(error: BaseException) -> Idefics2Error:
    return _translated(error, ConfigError, "tokenizer.json: is not a tokenizer")


def _translated(error: BaseException, kind: type[Idefics2Error], said: str) -> Idefics2Error:
    """Return the library's ``error`` as one of ours, which begins with what is ``said``.

    Raise any other.
    """
    is_panic = type(error).__name__ == "PanicException"  # of no module that can be imported
    # What a signal's handler raises after the call has a frame of its own
    is_raised_there = error.__traceback__ is None or error.__traceback__.tb_next is None
    if not (is_raised_there and (is_panic or type(error) is Exception)):
        raise error
    return kind(f"{said}: {error!s:.300}")


def _check_growth(part: str, step: Mapping[str, Any] | None) -> None:
    most = growth(step)
    if most > _MOST_GROWTH:
        raise ConfigError(
            f"tokenizer.json: {part} must make at most {_MOST_GROWTH} characters of one, got up to {most:.6g} by {short_repr(step)}"
        )


def _check_decoder(decoder: Mapping[str, Any] | None) -> None:
    """Refuse what may panic on an answer, whose text would be lost after it was computed."""
    for leaf in leaves(decoder):
        if leaf["type"] == "Replace" and "String" not in leaf["pattern"]:
            raise ConfigError(
                f"tokenizer.json: decoder must replace texts and no expressions, got {short_repr(leaf)}"
            )
        if leaf["type"] == "Strip" and leaf["stop"] != 0:
            raise ConfigError(
                f"tokenizer.json: decoder must strip nothing from the end, got {short_repr(leaf)}"
            )
