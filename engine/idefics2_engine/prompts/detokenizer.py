"""Incremental detokenization in whole characters."""

import codecs
from collections.abc import Sequence

from idefics2_engine.prompts.tokenizer import Tokenizer

# An incomplete character decodes to this
_REPLACEMENT = "\ufffd"
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one growing sequence; results of ``add`` and ``flush`` join to its ``decode``.

    A piece decodes differently after another piece, with its leading space. New text is therefore
    the difference between decoding with and without the new pieces. Text is held back until its
    last character is complete. Bytes that form no character become U+FFFD. Unlike here, ``decode``
    then also loses complete characters around them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special_tokens else frozenset()
        self._bytes = tokenizer.byte_values
        self._utf8 = _utf8_decoder("replace")
        # The last ids whose text has been returned, and the ids after them
        self._emitted: list[int] = []
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """Add the next id and return the text that is now complete; often empty for a byte."""
        if token_id in self._skipped:
            return ""
        if token_id in self._bytes:
            text = self._emit()
            character = self._utf8.decode(self._bytes[token_id])
            if not self._emitted:
                # The tokenizer drops the leading space of every text
                character = character.removeprefix(" ")
            self._emitted = [token_id]
            return text + character
        broken = self._utf8.decode(b"", True)
        self._pending.append(token_id)
        text = self._new_text()
        return broken if not text or text.endswith(_REPLACEMENT) else broken + self._emit()

    def add_all(self, token_ids: Sequence[int]) -> str:
        """Add ids and return what ``add`` would return for them, joined.

        Pieces between bytes are decoded at once, which takes a hundredth of the time.
        """
        text = ""
        pieces: list[int] = []
        for token_id in token_ids:
            if token_id in self._skipped:
                continue
            if token_id in self._bytes:
                text += self._add_pieces(pieces) + self.add(token_id)
                pieces = []
            else:
                pieces.append(token_id)
        return text + self._add_pieces(pieces)

    def _add_pieces(self, pieces: list[int]) -> str:
        if len(pieces) > 1:
            tokens = self._emitted + self._pending + pieces
            before = self._tokenizer.decode(self._emitted, skip_special_tokens=False)
            text = self._tokenizer.decode(tokens, skip_special_tokens=False)[len(before) :]
            if text and not text.endswith(_REPLACEMENT):
                self._emitted, self._pending = tokens, []
                return self._utf8.decode(b"", True) + text
        # The last character may be incomplete, and the text of some pieces is held back
        return "".join(map(self.add, pieces))

    def flush(self) -> str:
        """Return the text that was held back at the end of the sequence, and reset."""
        text = self._emit() + self._utf8.decode(b"", True)
        self._emitted = []
        return text

    def _emit(self) -> str:
        """Return the text of the pending pieces and mark them as emitted."""
        text = self._new_text()
        if self._pending:
            self._emitted, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._emitted, skip_special_tokens=False)
        after = self._tokenizer.decode(self._emitted + self._pending, skip_special_tokens=False)
        return after[len(before) :]
