"""How to choose tokens and when to stop: vLLM's names, checked when they are set."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from idefics2_engine.errors import SamplingError
from idefics2_engine.shown import shown

_LARGEST = 1e6  # far beyond it fp32 logits overflow
_MOST_ANSWERS = 16384  # to one prompt, as in vLLM: each is a sequence that waits for its turn


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
        seed: Makes the request's random numbers its own; drawn from the engine's seed if ``None``.
        n: Answers to give.
        max_tokens: Tokens to generate at most; up to the model's length if ``None``.
        min_tokens: Tokens to generate before the answer may end.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after an end token of the checkpoint.
        skip_special_tokens: Leave control tokens out of the text.

    Raises:
        SamplingError: A value is out of its range or of the wrong type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Check every bound; numbers of other libraries become Python's."""
        self._number("temperature", 0.0, _LARGEST)
        self._number("top_p", 0.0, 1.0, above=True)
        self._integer("top_k", -1, 2**31 - 1)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 1 / _LARGEST, _LARGEST)
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
        if not isinstance(self.stop_token_ids, (list, tuple)):
            raise SamplingError(
                f"stop_token_ids must be a list of token ids, got {shown(self.stop_token_ids)}"
            )
        ids = tuple(_integer("stop_token_ids", token, 0) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(
                    f"{name} must be True or False, got {shown(getattr(self, name))}"
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
