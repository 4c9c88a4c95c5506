"""Constraints compiled for one checkpoint's tokenizer, within limits; any thread may compile."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from idefics2_engine.errors import SamplingError
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.structured.check import import_llguidance
from idefics2_engine.structured.grammar import (
    MAY_SPACE,
    MUST_SPACE,
    NO_SPACE,
    grammar_of,
    plain_regex,
)
from idefics2_engine.structured.limits import MOST_SECONDS, limits, reason, within
from idefics2_engine.structured.matcher import Matcher
from idefics2_engine.structured.params import StructuredOutputsParams
from idefics2_engine.structured.shortest import fewest_tokens, fewest_tokens_of_choice

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = npt.NDArray[np.int32]
"""Bits of tokens, 32 a word, the lowest first."""

_MOST_CONSTRAINTS = 256


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Sets of a vocabulary's tokens, each as bits.

    Attributes:
        usable: Tokens that may be in an answer: all but control tokens.
        ends: End tokens of the checkpoint.
    """

    usable: Words
    ends: Words


@dataclass(frozen=True, eq=False)
class Constraint:
    """A compiled constraint.

    Attributes:
        start: A matcher before the first token, which is never advanced.
        tokens: Sets of tokens.
        fewest_tokens: About how many tokens a shortest answer has, its end included; 0 if unknown.
    """

    start: "LLMatcher"
    tokens: TokenSets
    fewest_tokens: int

    def matcher(self) -> Matcher:
        """Return a matcher for one answer."""
        return Matcher(self.start.deep_copy())


class Compiler:
    """Compiles constraints, and keeps the last 256 or their errors.

    Args:
        tokenizer: The checkpoint's tokenizer.
        vocab_size: Tokens of the model's vocabulary.
        eos_token_ids: End tokens of the checkpoint.
        most_seconds: CPU time in which a constraint must be compiled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        most_seconds: float = MOST_SECONDS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._most_seconds = most_seconds
        self._results = lru_cache(_MOST_CONSTRAINTS)(self._result)

    def constraint(self, params: StructuredOutputsParams, *, spaced: bool) -> Constraint:
        """Return the compiled ``params``.

        Args:
            params: The constraint.
            spaced: Whether the answer may begin with a space that its text has not.

        Raises:
            SamplingError: llguidance is not installed, or cannot enforce the constraint whole, or no
                answer satisfies it, or it is too large.
        """
        result = self._results(params, spaced)
        if isinstance(result, SamplingError):
            raise SamplingError(str(result))
        return result

    def _result(self, params: StructuredOutputsParams, spaced: bool) -> Constraint | SamplingError:
        try:
            within(self._most_seconds, lambda: self._llguidance, "its tokenizer")
            return within(self._most_seconds, lambda: self._compile(params, spaced), params.kind)
        except SamplingError as error:
            return error

    def _compile(self, params: StructuredOutputsParams, spaced: bool) -> Constraint:
        llguidance = self._llguidance
        plain = plain_regex(params)
        if plain is not None:
            self._start(params, plain)
        start = self._start(params, grammar_of(params, NO_SPACE))
        mask = np.frombuffer(start.deep_copy().compute_bitmask(), np.int32)
        usable = self._tokens.usable
        if not (start.is_accepting() or (mask[: len(usable)] & usable).any()):
            raise SamplingError(f"{params.kind} must allow an answer, got one that allows none")
        space = llguidance.tokenize_bytes(b" ")
        if start.validate_tokens(space):
            # The text would lose a space that belongs to it
            start = self._start(params, grammar_of(params, MUST_SPACE))
        elif spaced:
            start = self._start(params, grammar_of(params, MAY_SPACE))
        if params.choice is None:
            fewest = fewest_tokens(start, self._token_texts, usable)
        else:
            fewest = fewest_tokens_of_choice(params.choice, llguidance)
        return Constraint(start, self._tokens, fewest)

    def _start(self, params: StructuredOutputsParams, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        start = LLMatcher(self._llguidance, grammar, log_level=0, limits=limits())
        if not start.is_error():
            # Only this finds a grammar without any answer
            start.deep_copy().compute_bitmask()
        for said in [start.get_error()] if start.is_error() else start.get_grammar_warnings():
            raise SamplingError(reason(params.kind, said))
        return start

    @cached_property
    def _llguidance(self) -> "LLTokenizer":
        import_llguidance()
        from llguidance import LLTokenizer

        return LLTokenizer(
            self._tokenizer.description(),
            n_vocab=self._vocab_size,
            eos_token=self._eos_token_ids or None,
        )

    @cached_property
    def _tokens(self) -> TokenSets:
        usable = np.zeros(-(-self._vocab_size // 32) * 32, np.bool_)
        usable[: self._tokenizer.vocab_size] = True
        usable[sorted(self._tokenizer.control_ids)] = False
        ends = np.zeros_like(usable)
        ends[self._eos_token_ids] = True
        usable[self._eos_token_ids] = False
        return TokenSets(_words(usable), _words(ends))

    @cached_property
    def _token_texts(self) -> list[bytes]:
        return [self._llguidance.decode_bytes([id]) for id in range(self._vocab_size)]


def _words(bits: npt.NDArray[np.bool_]) -> Words:
    return np.packbits(bits, bitorder="little").view(np.int32)
