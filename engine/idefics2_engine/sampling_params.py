"""How to choose tokens and when to stop: vLLM's names, checked when they are set."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.field_checks import (
    ListOf,
    MismatchError,
    Number,
    OrNone,
    Whole,
    check_fields,
    checked,
    flag,
)

_LARGEST = 1e6  # far beyond it fp32 logits overflow
_MOST_ANSWERS = 16384  # to one prompt, as in vLLM: each is a sequence that waits for its turn
_LARGEST_BIAS = 100.0  # as in OpenAI's interface
_TOKEN_ID = Whole(0)


def _biases(values: object) -> dict[int, float]:
    """Accept a mapping from token ids, which JSON writes as text, to numbers."""
    if not isinstance(values, Mapping):
        raise MismatchError("a mapping from token ids to numbers", short_repr(values))
    to_bias = Number(-_LARGEST_BIAS, _LARGEST_BIAS)
    biases: dict[int, float] = {}
    for key, value in values.items():
        try:
            in_json = isinstance(key, str) and re.fullmatch("[0-9]{1,19}", key)
            token, bias = _TOKEN_ID(int(key) if in_json else key), to_bias(value)
        except MismatchError:
            wanted = "a mapping from token ids to numbers in [-100, 100]"
            raise MismatchError(wanted, f"{short_repr(value)} for {short_repr(key)}") from None
        if token in biases:
            raise MismatchError("a mapping with each token id once", f"{short_repr(key)} twice")
        biases[token] = bias
    return biases


def _string(value: object) -> str:
    """Accept a string that is not empty and that UTF-8 can write."""
    if not isinstance(value, str) or not value or not _is_unicode(value):
        raise MismatchError("not empty and writable in UTF-8", short_repr(value))
    return value


def _word(value: object) -> str:
    """Accept a string that is more than spaces and that UTF-8 can write."""
    if not isinstance(value, str) or not value.strip(" ") or not _is_unicode(value):
        raise MismatchError("more than spaces and writable in UTF-8", short_repr(value))
    return value


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Choices for one request.

    Attributes:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_p: Keep the most likely tokens that together have this probability; 1 keeps all.
        top_k: Keep this many most likely tokens; 0 or -1 keeps all.
        min_p: Keep tokens with at least this fraction of the most likely one's probability.
        repetition_penalty: Divide positive logits of tokens seen in prompt or answer by this,
            multiply negative ones; image tokens do not count.
        presence_penalty: Subtract this from the logits of tokens that the answer has; from -2 to 2.
        frequency_penalty: Subtract this as often as the answer has the token; from -2 to 2.
        logit_bias: Add this, from -100 to 100, to the logits of tokens, by id.
        allowed_token_ids: The only tokens to choose from; all if ``None``.
        bad_words: Words that the answer may not have, at the beginning of a word or inside one: the
            token that would complete one is barred. A string is one word.
        seed: Makes the request's random numbers its own; drawn from the engine's seed if ``None``.
        n: Answers to give.
        max_tokens: Tokens to generate at most; up to the model's length if ``None``.
        min_tokens: Tokens to generate before the answer may end.
        stop: Strings that end the answer, or one string.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after an end token of the checkpoint.
        skip_special_tokens: Leave control tokens out of the text.
        logprobs: How many of the likeliest tokens to report at each place of the answer, beside the
            chosen one; at most the vocabulary, which -1 stands for. Above 20 they may have 524,288
            entries for all places of the answers together: 16 places of a vocabulary of 32,003.
            They are the model's own, before anything above. None if ``None``.
        prompt_logprobs: The same for each place of the prompt but the first.

    Raises:
        SamplingError: A value is out of its range or of the wrong type.
    """

    temperature: float = checked(Number(0.0, _LARGEST), 1.0)
    top_p: float = checked(Number(0.0, 1.0, above=True), 1.0)
    top_k: int = checked(Whole(-1, 2**31 - 1), 0)
    min_p: float = checked(Number(0.0, 1.0), 0.0)
    repetition_penalty: float = checked(Number(1 / _LARGEST, _LARGEST), 1.0)
    presence_penalty: float = checked(Number(-2.0, 2.0), 0.0)
    frequency_penalty: float = checked(Number(-2.0, 2.0), 0.0)
    logit_bias: Mapping[int, float] | None = checked(OrNone(_biases), None, hash=False)
    allowed_token_ids: Sequence[int] | None = checked(
        OrNone(ListOf(_TOKEN_ID, "token ids", least=1)), None
    )
    bad_words: str | Sequence[str] = checked(ListOf(_word, "words", or_one=True), ())
    seed: int | None = checked(OrNone(Whole(-(2**63), 2**63 - 1)), None)
    n: int = checked(Whole(1, _MOST_ANSWERS), 1)
    max_tokens: int | None = checked(OrNone(Whole(1)), 16)
    min_tokens: int = checked(Whole(0), 0)
    stop: str | Sequence[str] = checked(ListOf(_string, "strings", or_one=True), ())
    stop_token_ids: Sequence[int] = checked(ListOf(_TOKEN_ID, "token ids"), ())
    include_stop_str_in_output: bool = checked(flag, False)
    ignore_eos: bool = checked(flag, False)
    skip_special_tokens: bool = checked(flag, True)
    logprobs: int | None = checked(OrNone(Whole(-1)), None)
    prompt_logprobs: int | None = checked(OrNone(Whole(-1)), None)

    def __post_init__(self) -> None:
        """Check every bound; numbers of other libraries become Python's."""
        check_fields(self, SamplingError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens {short_repr(self.max_tokens)}, "
                f"got {short_repr(self.min_tokens)}"
            )

    @property
    def penalizes(self) -> bool:
        """Whether tokens that have occurred change logits."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from what came as JSON, where a wrong name is bad input and no wrong call.

        Raises:
            SamplingError: A name is unknown, or a value is out of its range or of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise SamplingError(f"sampling parameters must be a dict, got {short_repr(values)}")
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise SamplingError(
                    f"{short_repr(name)} must be one of {', '.join(known)}, got it with {short_repr(value)}"
                )
        return cls(**values)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse what a model with ``vocab_size`` tokens does not have.

        Raises:
            SamplingError: A token id is not below ``vocab_size``, or more log probabilities are
                asked for.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            largest = max(getattr(self, name) or (0,))
            if largest >= vocab_size:
                raise SamplingError(
                    f"{name} must be below the vocabulary's {vocab_size}, got {short_repr(largest)}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name) or 0
            if number > vocab_size:
                raise SamplingError(
                    f"{name} must be at most the vocabulary's {vocab_size}, got {short_repr(number)}"
                )
