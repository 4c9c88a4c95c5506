"""The tokenizer, and the tokens that stand for an image.

Control tokens (``<image>``, ``<end_of_utterance>``, ``<s>``, ...) are spelled like any other text,
so in a conversation typed ones must be distinguished from those of the template. In typed text, a
mark follows each character that could start a control token. The tokenizer searches for control
tokens first, and the marks prevent a match. It then deletes the marks before it splits the rest
into pieces, so marked text has exactly the ids of the unmarked text. Added tokens that are not
control tokens are also recognized with marks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, PromptError, short_repr
from idefics2_engine.json_file import read_json
from idefics2_engine.prompts.token_library import TokenLibrary

IMAGE = "<image>"
FAKE_IMAGE = "<fake_token_around_image>"
END_OF_UTTERANCE = "<end_of_utterance>"

# Unicode reserves these two noncharacters for internal use. A text that contains both in a row gets
# a mark between them; deleting marks removes the inner two and keeps the outer two.
_MARK = "\ufdd0\ufdd1"
_ESCAPED_MARK = _MARK[0] + _MARK + _MARK[1]


class Tokenizer:
    """A checkpoint's tokenizer, with its control tokens by name."""

    def __init__(self, description: Mapping[str, Any], settings: Mapping[str, Any]):
        """Build from the parsed ``tokenizer.json`` and ``tokenizer_config.json``.

        Raises:
            ConfigError: They contradict each other or lack what Idefics2 needs.
        """
        self._library = TokenLibrary(_with_marks(description))
        # Ids of the texts of the last batch
        self._prepared: dict[str, list[int]] = {}
        added = self._library.added_tokens.items()
        self._special = {token.content: id for id, token in added if token.special}
        starts = "".join(sorted({token[0] for token in self._special}))
        self._starts = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)")
        for id, token in added:
            marked = self._mark_starts(token.content)
            # A normalized token is searched for after normalization, which deletes marks
            if marked != token.content and not token.special and not token.normalized:
                self._library.add_spelling(id, marked)
        self.bos = self._named(settings, "bos_token")
        self.eos = self._named(settings, "eos_token")
        self.pad = self._named(settings, "pad_token")
        self.unk = self._unknown(settings)
        self._prefix = self._bos_prefix(settings)
        self._check_special(unknown=description["model"].get("unk_token"))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read ``tokenizer.json`` and ``tokenizer_config.json`` from ``folder``."""
        return cls(
            read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        )

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one, so control tokens and gaps count."""
        return self._library.vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._special.get(self.bos or "")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._special.get(self.eos or "")

    @property
    def pad_id(self) -> int | None:
        """Id of the token that pads shorter rows of a batch."""
        return self._special.get(self.pad or "")

    @property
    def image_id(self) -> int:
        """Id of the token whose embedding is replaced by an image feature."""
        return self._special[IMAGE]

    @property
    def fake_image_id(self) -> int:
        """Id of the token before and after an image's features."""
        return self._special[FAKE_IMAGE]

    @property
    def end_of_utterance_id(self) -> int | None:
        """Id of the token that ends a turn; ``None`` in the base model."""
        return self._special.get(END_OF_UTTERANCE)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of every control token."""
        return frozenset(self._special.values())

    @cached_property
    def byte_values(self) -> Mapping[int, bytes]:
        """Bytes of the pieces that stand for one byte each, by id."""
        ids = {byte: self._library.id_of(f"<0x{byte:02X}>") for byte in range(256)}
        return {id: bytes([byte]) for byte, id in ids.items() if id is not None}

    def description(self) -> str:
        """Return a ``tokenizer.json`` that reads text alone, without control tokens."""
        return json.dumps(self._library.description())

    def mark_typed(self, text: str) -> str:
        """Return ``text`` such that ``encode_marked`` finds no control token that starts in it."""
        check_text(text)
        text = text.replace(_MARK, _ESCAPED_MARK)
        # The next part may begin with the other half of a mark
        if text.endswith(_MARK[0]):
            text += _MARK
        return self._mark_starts(text)

    def unmark(self, text: str) -> str:
        """Return ``text`` without marks."""
        return text.replace(_MARK, "")

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of ``text``, in which control tokens are recognized.

        Args:
            text: Any text.
            add_bos: Begin with ``<s>`` if the checkpoint's tokenizer does.

        Raises:
            PromptError: ``text`` is not a string, cannot be encoded in UTF-8, or the tokenizer
                fails on it.
        """
        check_text(text)
        return self.encode_marked(text.replace(_MARK, _ESCAPED_MARK), add_bos)

    def encode_marked(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of ``text``, whose typed parts are results of ``mark_typed``."""
        ids = self._prepared.get(text) or self._library.encode(text)
        return [*self._prefix, *ids] if add_bos else [*ids]

    def prepare(self, marked: Sequence[str]) -> None:
        """Tokenize texts at once, in less time, for the next calls of ``encode_marked``."""
        self._prepared = self._library.encode_all(marked)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of typed ``text``, without control tokens and ``<s>``."""
        return self.encode_marked(self.mark_typed(text), add_bos=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``, without SentencePiece's leading space."""
        return self._library.decode(ids, skip_special_tokens)

    def _mark_starts(self, text: str) -> str:
        return self._starts.sub(lambda start: start[0] + _MARK, text)

    def _named(self, settings: Mapping[str, Any], key: str) -> str | None:
        token = settings.get(key)
        # Older releases of transformers save a token with its flags
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is None:
            return None
        if not isinstance(token, str) or token not in self._special:
            raise ConfigError(
                f"tokenizer_config.json: {key} must be a special token of tokenizer.json, "
                f"got {short_repr(token)}"
            )
        return token

    def _unknown(self, settings: Mapping[str, Any]) -> str | None:
        """Return the ``unk_token``, which need not be special because only templates use it."""
        token = settings.get("unk_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _bos_prefix(self, settings: Mapping[str, Any]) -> list[int]:
        """Return the tokens that begin every text: ``[bos]`` or none."""
        bos = [] if self.bos_id is None else [self.bos_id]
        added = self._library.prefix
        if added not in ([], bos):
            raise ConfigError(
                f"tokenizer.json: post_processor must add nothing but the bos {bos}, got {added}"
            )
        if settings.get("add_eos_token"):
            raise ConfigError("tokenizer_config.json: add_eos_token must be false, got true")
        add_bos = settings.get("add_bos_token")
        if add_bos is None:
            return added
        if add_bos and not bos:
            raise ConfigError("tokenizer_config.json: add_bos_token needs a bos_token, got none")
        return bos if add_bos else []

    def _check_special(self, unknown: str | None) -> None:
        for token in (IMAGE, FAKE_IMAGE):
            if token not in self._special:
                raise ConfigError(f"tokenizer.json: added_tokens must have {token}, got none")
        for token, id in self._special.items():
            # A mark follows the first character, so there must be a second one. Pieces must not
            # merge into the token, except that unknown characters may become ``unknown``.
            plain = self.encode_plain(token) + self.encode_plain("a" + token)
            if len(token) < 2 or (id in plain and token != unknown):
                raise ConfigError(
                    f"tokenizer.json: no plain text may become the special token {token!r}"
                )


def check_text(text: str, name: str = "text") -> None:
    """Raise ``PromptError`` about ``name`` unless ``text`` is a string that UTF-8 can encode."""
    if not isinstance(text, str):
        raise PromptError(f"{name}: must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name}: must be Unicode characters, got half of a surrogate pair at {error.start}"
        ) from None


def expand_placeholders(text: str, image_seq_len: int, tiles_per_image: int) -> str:
    """Expand each ``<image>`` to its tokens, like transformers' ``Idefics2Processor``.

    A tile is ``image_seq_len`` times ``<image>`` between two ``<fake_token_around_image>``. Two of
    these in a row become one, and a space is added before a word that follows one.
    """
    tile = FAKE_IMAGE + IMAGE * image_seq_len + FAKE_IMAGE
    text = text.replace(IMAGE, tile * tiles_per_image)
    text = text.replace(FAKE_IMAGE * 2, FAKE_IMAGE)
    return re.sub(rf"{FAKE_IMAGE}(?=[^\s<])", f"{FAKE_IMAGE} ", text)


def _with_marks(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's description with a first normalizer that deletes marks."""
    added = []
    tokens = description.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, Mapping) for token in tokens):
        raise ConfigError(
            f"tokenizer.json: added_tokens must be a list of objects, got {short_repr(tokens)}"
        )
    for token in tokens:
        if token.get("special") or token.get("content") in (IMAGE, FAKE_IMAGE, END_OF_UTTERANCE):
            # A normalized token would be searched for after normalization, which deletes marks
            token = {**token, "special": True, "normalized": False}
        added.append(token)
    normalizers = [{"type": "Replace", "pattern": {"String": _MARK}, "content": ""}]
    if description.get("normalizer") is not None:
        normalizers.append(description["normalizer"])
    return {
        **description,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "padding": None,
        "truncation": None,
    }
