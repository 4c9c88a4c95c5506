"""Answers of a model that wants anything, drawn from the tokens that a constraint allows."""

import random
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.sampling.token_masks import TokenMasks
from idefics2_engine.structured.compiler import Compiler, Constraint
from idefics2_engine.structured.params import StructuredOutputsParams

VOCAB = 960
ENDS = (2, 959)
_CLOSING = ('"', "}", "]")
_MASKS = TokenMasks()


class Answer(NamedTuple):
    """Tokens without an end token, their text, and whether the answer ended by itself."""

    tokens: list[int]
    text: str
    is_whole: bool


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_MODEL)


@cache
def compiler() -> Compiler:
    return Compiler(tokenizer(), VOCAB, ENDS)


def compiled(*, spaced: bool = True, **constraint: Any) -> Constraint:
    """Compile a constraint for the demo checkpoint's tokenizer."""
    return compiler().constraint(StructuredOutputsParams(**constraint), spaced=spaced)


class _StandIn:
    """Has what is read of a sequence."""


def allowed_tokens(constraint: Constraint, matcher: Any) -> list[int]:
    """Return the tokens that the sampler would leave."""
    stand_in: Any = _StandIn()
    stand_in.request, stand_in.matcher = SimpleNamespace(constraint=constraint), matcher
    bits, failed = _MASKS.compute([stand_in])
    for error in failed.values():
        raise error
    places = np.unpackbits(bits[0].view(np.uint8), bitorder="little")[:VOCAB]
    found: list[int] = np.flatnonzero(places).tolist()
    return found


@cache
def _closing_tokens() -> frozenset[int]:
    library = tokenizer()
    return frozenset(
        id for id in range(VOCAB) if library.decode([id], skip_special_tokens=False) in _CLOSING
    )


@cache
def _letter_tokens() -> frozenset[int]:
    return frozenset(
        id
        for id in range(VOCAB)
        if len(text := tokenizer().decode([id], skip_special_tokens=False)) == 1 and text.isascii()
    )


def draw_answer(constraint: Constraint, seed: int, most: int = 120) -> Answer:
    """Draw tokens until the answer ends or has ``most`` tokens.

    All allowed tokens are equally likely, except that every third draw prefers those that close
    something, so that answers end.
    """
    rng, matcher = random.Random(seed), constraint.matcher()
    tokens: list[int] = []
    is_whole = False
    while len(tokens) < most:
        allowed = allowed_tokens(constraint, matcher)
        assert allowed, tokens
        closing = [id for id in allowed if id in _closing_tokens() or id in ENDS]
        token = rng.choice(closing if closing and rng.random() < 0.3 else allowed)
        if token in ENDS:
            is_whole = True
            break
        tokens.append(token)
        matcher.consume(token)
        if matcher.is_complete:
            is_whole = True
            break
    return Answer(tokens, tokenizer().decode(tokens), is_whole)


def accepts(constraint: Constraint, text: str) -> bool:
    """Return whether ``constraint`` allows the usual tokens of ``text``, one after the other."""
    state = constraint.start.deep_copy()
    # The tokenizer puts a space before a text
    tokens = tokenizer().encode_plain(text)
    return bool(state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting())


def can_be_completed(constraint: Constraint, tokens: list[int]) -> bool:
    """Return whether some answer that satisfies ``constraint`` begins with ``tokens``.

    The search closes what is open where it may, half the time, and otherwise draws ASCII.
    """
    rng, matcher = random.Random(0), constraint.matcher()
    for token in tokens:
        matcher.consume(token)
    for _ in range(3000):
        if matcher.may_end:
            return True
        allowed = allowed_tokens(constraint, matcher)
        closing = [id for id in allowed if id in _closing_tokens()]
        letters = [id for id in allowed if id in _letter_tokens()]
        best = closing if closing and rng.random() < 0.5 else letters or allowed
        matcher.consume(rng.choice(best))
    return False
