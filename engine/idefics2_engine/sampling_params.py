"""How to choose tokens and when to stop: vLLM's names, checked when they are set."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from idefics2_engine.errors import SamplingError
from idefics2_engine.shown import shown

_LARGEST = 1e6  # far beyond it fp32 logits overflow
_MOST_ANSWERS = 16384  # to one prompt, as in vLLM: each is a sequence that waits for its turn
_LARGEST_BIAS = 100.0  # as in OpenAI's interface


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Choices for one request.

    Attributes:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_p: Keep the most likely tokens that together have this probability; 1 keeps all.
        top_k: Keep this many most likely tokens; 0 or -1 keeps all.
        min_p: Keep tokens with at least this fraction of the most likely one's probability.
        repetition_penalty: Divide positive logits of tokens seen in prompt or answer by this, multiply
            negative ones; image tokens do not count.
        presence_penalty: Subtract this from the logits of tokens that the answer has; from -2 to 2.
        frequency_penalty: Subtract this as often as the answer has the token; from -2 to 2.
        logit_bias: Add this, from -100 to 100, to the logits of tokens, by id.
        allowed_token_ids: The only tokens to choose from; all if ``None``.
        bad_words: Words that the answer may not have, at the beginning of a word or inside one: the token that would
            complete one is barred.
        seed: Makes the request's random numbers its own; drawn from the engine's seed if ``None``.
        n: Answers to give.
        max_tokens: Tokens to generate at most; up to the model's length if ``None``.
        min_tokens: Tokens to generate before the answer may end.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after an end token of the checkpoint.
        skip_special_tokens: Leave control tokens out of the text.
        logprobs: How many of the likeliest tokens to report at each place of the answer, beside the chosen one; at
            most the vocabulary, which -1 stands for. Above 20 they may have 524,288 entries for all places of the answers
            together: 16 places of a vocabulary of 32,003. They are the model's own, before anything above. None if ``None``.
        prompt_logprobs: The same for each place of the prompt but the first.

    Raises:
        SamplingError: A value is out of its range or of the wrong type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every bound; numbers of other libraries become Python's."""
        self._number("temperature", 0.0, _LARGEST)
        self._number("top_p", 0.0, 1.0, above=True)
        self._integer("top_k", -1, 2**31 - 1)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 1 / _LARGEST, _LARGEST)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            given = self.allowed_token_ids
            self._token_ids("allowed_token_ids")
            if not self.allowed_token_ids:
                raise SamplingError(f"allowed_token_ids must have a token id, got {shown(given)}")
        object.__setattr__(self, "bad_words", _words(self.bad_words))
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**63 - 1)
        self._integer("n", 1, _MOST_ANSWERS)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1)
        self._integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens {shown(self.max_tokens)}, "
                f"got {shown(self.min_tokens)}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise SamplingError(f"stop must hold non-empty strings, got {shown(self.stop)}")
        object.__setattr__(self, "stop", tuple(stop))
        self._token_ids("stop_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, -1)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(
                    f"{name} must be True or False, got {shown(getattr(self, name))}"
                )

    @property
    def penalises(self) -> bool:
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
            raise SamplingError(f"sampling parameters must be a dict, got {shown(values)}")
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise SamplingError(
                    f"{shown(name)} must be one of {', '.join(known)}, got it with {shown(value)}"
                )
        return cls(**values)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse what a model with ``vocab_size`` tokens does not have.

        Raises:
            SamplingError: A token id is not below ``vocab_size``, or more log probabilities are asked for.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            largest = max(getattr(self, name) or (0,))
            if largest >= vocab_size:
                raise SamplingError(
                    f"{name} must be below the vocabulary's {vocab_size}, got {shown(largest)}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name) or 0
            if number > vocab_size:
                raise SamplingError(
                    f"{name} must be at most the vocabulary's {vocab_size}, got {shown(number)}"
                )

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        """Refuse what is not a finite number in [low, high], or in (low, high] with ``above``."""
        number = _float(getattr(self, name))
        if not low <= number <= high or (above and number == low):  # NaN is in no range
            bracket = "(" if above else "["
            raise SamplingError(
                f"{name} must be a number in {bracket}{low:g}, {high:g}], "
                f"got {shown(getattr(self, name))}"
            )
        object.__setattr__(self, name, number)

    def _integer(self, name: str, low: int, high: float = math.inf) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))

    def _token_ids(self, name: str) -> None:
        values = getattr(self, name)
        if not isinstance(values, (list, tuple)):
            raise SamplingError(f"{name} must be a list of token ids, got {shown(values)}")
        object.__setattr__(self, name, tuple(_integer(name, token, 0) for token in values))


def _biases(values: object) -> dict[int, float]:
    """Return ``logit_bias`` with Python's own numbers; JSON writes its keys as text."""
    if not isinstance(values, Mapping):
        raise SamplingError(f"logit_bias must map token ids to numbers, got {shown(values)}")
    biases: dict[int, float] = {}
    for key, value in values.items():
        in_json = isinstance(key, str) and re.fullmatch("[0-9]{1,19}", key)
        token, bias = _integer("logit_bias", int(key) if in_json else key, 0), _float(value)
        if not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise SamplingError(
                f"logit_bias must have numbers in [-100, 100], got {shown(value)} for {shown(token)}"
            )
        if token in biases:
            raise SamplingError(f"logit_bias must have a token once, got {shown(key)} twice")
        biases[token] = bias
    return biases


def _words(values: object) -> tuple[str, ...]:
    """Return ``bad_words`` as a tuple of words that can be written in UTF-8 and are more than spaces."""
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(word, str) and word.strip(" ") and _is_unicode(word) for word in values
    ):
        raise SamplingError(
            f"bad_words must hold words, not empty ones or spaces, got {shown(values)}"
        )
    return tuple(values)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _float(value: object) -> float:
    """Return a real number as Python's, NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _integer(name: str, value: object, low: int, high: float = math.inf) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise SamplingError(f"{name} must be an integer {bounds}, got {shown(value)}")
    return number
