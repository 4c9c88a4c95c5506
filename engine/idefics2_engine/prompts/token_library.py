"""A wrapper of ``tokenizers`` that bounds its work and converts its errors.

The library raises bare ``Exception``, or a Rust panic, which is not an ``Exception`` in Python. All
other exceptions, such as interrupts and those of signal handlers, are passed on.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from idefics2_engine.errors import ConfigError, Idefics2Error, PromptError, short_repr
from idefics2_engine.prompts.text_growth import growth, leaves

# NFKC and lower case together may make 54 characters of one
_MOST_GROWTH = 64


class TokenLibrary:
    """A tokenizer of the library."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        """Build from the parsed ``tokenizer.json``.

        Raises:
            ConfigError: The library cannot build or use it, it could make a text far longer, or its
                decoder fails on some texts.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except BaseException as error:
            raise _unusable(error) from None
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            _check_growth(part, description.get(part))
        _check_decoder(description.get("decoder"))
        # The size includes added tokens and gaps between ids
        ids = sorted(self._tokenizer.get_vocab().values())
        self.vocab_size: int = 1 + ids[-1]
        self.added_tokens: dict[int, tokenizers.AddedToken] = (
            self._tokenizer.get_added_tokens_decoder()
        )
        # Ids of other spellings of added tokens, mapped to the tokens' ids
        self._spelled: dict[int, int] = {}
        # The library finds some errors only on first use
        try:
            self.prefix: list[int] = self._tokenizer.encode("").ids
            self._tokenizer.decode([])
            self._tokenizer.decode(ids, skip_special_tokens=False)
        except BaseException as error:
            raise _unusable(error) from None

    def add_spelling(self, id: int, spelling: str) -> None:
        """Recognize ``spelling`` as another spelling of the added token ``id``."""
        token = self.added_tokens[id]
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
        added = tokenizers.AddedToken(spelling, normalized=False, special=False, **flags)
        self._tokenizer.add_tokens([added])
        spelled = self._tokenizer.token_to_id(spelling)
        assert spelled is not None
        self._spelled[spelled] = id

    def description(self) -> dict[str, Any]:
        """Return the parsed ``tokenizer.json`` of the library, for text alone.

        It adds nothing to a text, and its control tokens have names that no text has, so that it
        finds none in one.
        """
        description: dict[str, Any] = json.loads(self._tokenizer.to_str())
        tokens = [t for t in description["added_tokens"] if t["id"] not in self._spelled]
        vocab = description["model"]["vocab"]
        for token in (t for t in tokens if t["special"]):
            name = f"\ufdd0{token['id']}\ufdd0"
            if token["content"] in vocab:
                vocab[name] = vocab.pop(token["content"])
            if description["model"].get("unk_token") == token["content"]:
                description["model"]["unk_token"] = name
            token["content"] = name
        return {**description, "added_tokens": tokens, "post_processor": None}

    def id_of(self, token: str) -> int | None:
        """Return the id of ``token``."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without the tokens that begin or end a text."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _translated(
                error, PromptError, "text: must be one that this tokenizer can read"
            ) from None
        return self._own_ids(ids)

    def encode_all(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the ids of ``texts`` by text, computed at once; none if the library fails on one.

        The library does not look for the characters of each token here, which takes a third of the
        time of ``encode``.
        """
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            _translated(error, PromptError, "")
            return {}
        return {text: self._own_ids(one.ids) for text, one in zip(texts, found, strict=True)}

    def _own_ids(self, ids: list[int]) -> list[int]:
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
    """Return the library's ``error`` as one of ``kind``, beginning with ``said``.

    Any other error is raised again.
    """
    # No importable module has the class PanicException
    is_panic = type(error).__name__ == "PanicException"
    # An error of a signal handler has the handler's frame in its traceback
    is_raised_there = error.__traceback__ is None or error.__traceback__.tb_next is None
    if not (is_raised_there and (is_panic or type(error) is Exception)):
        raise error
    return kind(f"{said}: {error!s:.300}")


def _check_growth(part: str, step: Mapping[str, Any] | None) -> None:
    try:
        most = growth(step)
    except (AttributeError, KeyError, TypeError, ValueError):
        # The library also reads objects that are written as arrays
        raise ConfigError(
            f"tokenizer.json: {part} must be an object, got {short_repr(step)}"
        ) from None
    if most > _MOST_GROWTH:
        raise ConfigError(
            f"tokenizer.json: {part} must make at most {_MOST_GROWTH} characters of one, got up to {most:.6g} by {short_repr(step)}"
        )


def _check_decoder(decoder: Mapping[str, Any] | None) -> None:
    """Reject decoders that may panic on an answer, whose text would be lost."""
    for leaf in leaves(decoder):
        if leaf["type"] == "Replace" and "String" not in leaf["pattern"]:
            raise ConfigError(
                f"tokenizer.json: decoder must replace texts and no expressions, got {short_repr(leaf)}"
            )
        if leaf["type"] == "Strip" and leaf["stop"] != 0:
            raise ConfigError(
                f"tokenizer.json: decoder must strip nothing from the end, got {short_repr(leaf)}"
            )
