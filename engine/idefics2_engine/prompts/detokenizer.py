"""Token ids to text as they come, whole characters at a time."""

import codecs

from idefics2_engine.prompts.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a part of a character decodes to
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one growing sequence; what ``add`` and ``flush`` return joins to its ``decode``.

    A piece decodes differently behind another (its leading space stays), so new text is what
    decoding adds to the pieces before. It is held back until its last character is whole. Pieces
    that are bytes and make no character become U+FFFD; ``decode`` then gives up every byte around
    them too, and here the whole characters stay.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special_tokens else frozenset()
        self._bytes = tokenizer.byte_values
        self._utf8 = _utf8_decoder("replace")
        self._emitted: list[int] = []  # the last ids whose text is out
        self._pending: list[int] = []  # ids after these

    def add(self, token_id: int) -> str:
        """Take the next id and return the text that is now complete, often empty for a byte."""
        if token_id in self._skipped:
            return ""
        if token_id in self._bytes:
            text = self._emit()
            character = self._utf8.decode(self._bytes[token_id])
            if not self._emitted:
                character = character.removeprefix(" ")  # as at the beginning of any text
            self._emitted = [token_id]
            return text + character
        broken = self._utf8.decode(b"", True)
        self._pending.append(token_id)
        text = self._new_text()
        return broken if not text or text.endswith(_REPLACEMENT) else broken + self._emit()

    def flush(self) -> str:
        """Return what is held back, at the end of the sequence; then begin anew."""
        text = self._emit() + self._utf8.decode(b"", True)
        self._emitted = []
        return text

    def _emit(self) -> str:
        """Return the pending pieces' text, which is out then."""
        text = self._new_text()
        if self._pending:
            self._emitted, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._emitted, skip_special_tokens=False)
        after = self._tokenizer.decode(self._emitted + self._pending, skip_special_tokens=False)
        return after[len(before) :]
