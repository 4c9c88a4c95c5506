"""Text to token ids: the tokenizer, and the tokens that stand for an image.

Control tokens (``<image>``, ``<end_of_utterance>``, ``<s>``, ...) are spelled like any other text,
so a conversation must tell those that the template writes from those that somebody typed. Typed
text gets a mark behind each character that a control token could start with. The tokenizer looks
for control tokens first, where the mark is in their way, and deletes the mark before it cuts the
rest into pieces, so that marked text has exactly the ids that it has without marks. Added tokens
that are no control tokens are found with their marks.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, PromptError, short_repr
from idefics2_engine.json_file import read_json
from idefics2_engine.prompts.token_library import TokenLibrary

IMAGE = "<image>"
FAKE_IMAGE = "<fake_token_around_image>"  # stands before and behind an image's embeddings
END_OF_UTTERANCE = "<end_of_utterance>"

# Two noncharacters, which Unicode sets aside for a program's own use. A text that does have them in
# a row gets a mark between them: what deletes marks takes the inner two and leaves the outer two.
_MARK = "\ufdd0\ufdd1"
_ESCAPED_MARK = _MARK[0] + _MARK + _MARK[1]


class Tokenizer:
    """A checkpoint's ``tokenizer.json``, with its control tokens by name."""

    def __init__(self, description: Mapping[str, Any], settings: Mapping[str, Any]):
        """Build from the parsed ``tokenizer.json`` and ``tokenizer_config.json``.

        Raises:
            ConfigError: They contradict each other or lack what Idefics2 needs.
        """
        self._library = TokenLibrary(_with_marks(description))
        added = self._library.added_tokens.items()
        self._special = {token.content: id for id, token in added if token.special}
        starts = "".join(sorted({token[0] for token in self._special}))
        self._starts = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)")
        for id, token in added:
            marked = self._mark_starts(token.content)
            # A normalized one is looked for behind the normalizer, where marks are gone
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
        """Ids up to the largest in use, control tokens and gaps included."""
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
        """Id that fills up the shorter rows of a batch."""
        return self._special.get(self.pad or "")

    @property
    def image_id(self) -> int:
        """Id whose embedding an image feature replaces."""
        return self._special[IMAGE]

    @property
    def fake_image_id(self) -> int:
        """Id that stands before and behind an image's features."""
        return self._special[FAKE_IMAGE]

    @property
    def end_of_utterance_id(self) -> int | None:
        """Id that ends a turn; None in the base model."""
        return self._special.get(END_OF_UTTERANCE)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of every control token."""
        return frozenset(self._special.values())

    @cached_property
    def byte_values(self) -> Mapping[int, bytes]:
        """The pieces that stand for one byte, by id: a character may need several."""
        ids = {byte: self._library.id_of(f"<0x{byte:02X}>") for byte in range(256)}
        return {id: bytes([byte]) for byte, id in ids.items() if id is not None}

    def mark_typed(self, text: str) -> str:
        """Return ``text`` such that ``encode_marked`` finds no control token that starts in it."""
        check_text(text)
        text = text.replace(_MARK, _ESCAPED_MARK)
        if text.endswith(_MARK[0]):  # the next part may begin with the other half
            text += _MARK
        return self._mark_starts(text)

    def unmark(self, text: str) -> str:
        """Return ``text`` as it was typed."""
        return text.replace(_MARK, "")

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of ``text``, control tokens recognized wherever they stand.

        Args:
            text: Any text.
            add_bos: Begin with ``<s>`` if the checkpoint's tokenizer does.

        Raises:
            PromptError: ``text`` is no string, cannot be written in UTF-8, or the tokenizer fails
                on it.
        """
        check_text(text)
        return self.encode_marked(text.replace(_MARK, _ESCAPED_MARK), add_bos)

    def encode_marked(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of ``text``, parts of which come from ``mark_typed``."""
        ids = self._library.encode(text)
        return [*self._prefix, *ids] if add_bos else ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of typed ``text``: no control token, no ``<s>``."""
        return self.encode_marked(self.mark_typed(text), add_bos=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``, without the space that begins a SentencePiece text."""
        return self._library.decode(ids, skip_special_tokens)

    def _mark_starts(self, text: str) -> str:
        return self._starts.sub(lambda start: start[0] + _MARK, text)

    def _named(self, settings: Mapping[str, Any], key: str) -> str | None:
        token = settings.get(key)
        if isinstance(token, Mapping):  # with flags, as older releases of transformers save it
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
        """Return the ``unk_token``, which need not be special: only templates ask for it."""
        token = settings.get("unk_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _bos_prefix(self, settings: Mapping[str, Any]) -> list[int]:
        """Return what begins every text: ``[bos]`` or nothing."""
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
            # A mark goes behind the first character, so there must be another. And pieces must not
            # merge into the token, but what the model does not know may become ``unknown``.
            plain = self.encode_plain(token) + self.encode_plain("a" + token)
            if len(token) < 2 or (id in plain and token != unknown):
                raise ConfigError(
                    f"tokenizer.json: no plain text may become the special token {token!r}"
                )


def check_text(text: str, name: str = "text") -> None:
    """Raise ``PromptError`` if ``text`` is no string or cannot be written in UTF-8.

    It is called ``name``.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name}: must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name}: must be Unicode characters, got half of a surrogate pair at {error.start}"
        ) from None


def expand_placeholders(text: str, image_seq_len: int, tiles_per_image: int) -> str:
    """Write out each ``<image>`` as its tokens, as transformers' ``Idefics2Processor`` does.

    A tile is ``image_seq_len`` times ``<image>`` between two ``<fake_token_around_image>``; two of
    these in a row become one; a word right behind one gets a space.
    """
    tile = FAKE_IMAGE + IMAGE * image_seq_len + FAKE_IMAGE
    text = text.replace(IMAGE, tile * tiles_per_image)
    text = text.replace(FAKE_IMAGE * 2, FAKE_IMAGE)
    return re.sub(rf"{FAKE_IMAGE}(?=[^\s<])", f"{FAKE_IMAGE} ", text)


def _with_marks(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same tokenizer's description with a normalizer in front that deletes marks."""
    added = []
    tokens = description.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, Mapping) for token in tokens):
        raise ConfigError(
            f"tokenizer.json: added_tokens must be a list of objects, got {short_repr(tokens)}"
        )
    for token in tokens:
        if token.get("special") or token.get("content") in (IMAGE, FAKE_IMAGE, END_OF_UTTERANCE):
            # A normalized token is looked for after the normalizer, where marks are gone
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
