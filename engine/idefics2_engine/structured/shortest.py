"""About how many tokens a shortest answer has, to warn if ``max_tokens`` is below."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A search of so many tokens takes a tenth of a second
_MOST_TOKENS = 512
_CLOSING = frozenset(b'"}] ')
# The shortest of many choices are looked at
_MOST_CHOICES = 32


def fewest_tokens(start: "LLMatcher", texts: Sequence[bytes], usable: npt.NDArray[np.int32]) -> int:
    """Return the tokens of the shorter of two answers from ``start`` on.

    Both close what is open as early as they can. One takes long tokens otherwise, the other short
    ones. A pattern may have a shorter answer. If neither ends within 512 tokens, nothing is known
    and the result is 0.
    """
    closes = np.array([bool(text.strip()) and set(text) <= _CLOSING for text in texts])
    lengths = np.array([len(text) for text in texts])
    counts = [
        _answer(start, np.where(closes, -1000 - lengths, sign * lengths), usable)
        for sign in (-1, 1)
    ]
    return min((count for count in counts if count is not None), default=0)


def fewest_tokens_of_choice(choices: Sequence[str], tokenizer: "LLTokenizer") -> int:
    """Return the fewest tokens of any of ``choices``."""
    return min(len(tokenizer.tokenize_str(one)) for one in sorted(choices, key=len)[:_MOST_CHOICES])


def _answer(
    start: "LLMatcher", rank: npt.NDArray[np.int64], usable: npt.NDArray[np.int32]
) -> int | None:
    """Return the tokens of an answer, its end included; ``None`` if it has too many or none ends."""
    state, count = start.deep_copy(), 0
    while count < _MOST_TOKENS:
        if state.is_accepting():
            # An end token follows where more could
            return count + (not state.is_stopped())
        tokens = state.compute_ff_tokens()
        if not tokens:
            mask = np.frombuffer(state.compute_bitmask(), np.int32)[: len(usable)] & usable
            allowed = np.flatnonzero(
                np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(rank)]
            )
            if not len(allowed):
                break
            tokens = [int(allowed[rank[allowed].argmin()])]
        if not state.consume_tokens(tokens):
            break
        count += len(tokens)
    return None
