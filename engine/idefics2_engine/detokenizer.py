"""Token ids to text as they come, whole characters at a time."""

from idefics2_engine.prompt import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no character, or none yet


class Detokenizer:
    """Text of one growing sequence; what ``add`` and ``flush`` return joins to its ``decode``.

    A piece decodes differently behind others (its leading space stays) and a byte may wait for the
    rest of its character. So new text is what decoding the last settled pieces with the new ones
    adds, and it is held back until it cannot change any more.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special_tokens else frozenset()
        # A run of byte pieces decodes as a whole: one wrong byte at its end spoils all of it
        self._unsettled = tokenizer.byte_ids()
        self._settled: list[int] = []  # the last ids whose text is out
        self._pending: list[int] = []  # ids after these

    def add(self, token_id: int) -> str:
        """Take the next id and return the text that is now complete, often empty for a byte."""
        if token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        if token_id in self._unsettled:
            return ""
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._settled, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return what is held back, at the end of the sequence; then begin anew."""
        text = self._new_text()
        self._settled, self._pending = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._settled, skip_special_tokens=False)
        after = self._tokenizer.decode(self._settled + self._pending, skip_special_tokens=False)
        return after[len(before) :]
