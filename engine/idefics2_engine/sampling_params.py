"""How to choose tokens and when to stop: vLLM's names, checked when they are set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from idefics2_engine.errors import SamplingError

_LARGEST = 1e6  # far beyond it fp32 logits overflow


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
        """Check every bound."""
        _number("temperature", self.temperature, 0.0, _LARGEST)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 1 / _LARGEST, _LARGEST)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _integer("n", self.n, 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens {self.max_tokens}, got {self.min_tokens}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise SamplingError(f"stop must hold non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.stop_token_ids, (list, tuple)):
            raise SamplingError(f"stop_token_ids must be token ids, got {self.stop_token_ids!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Refuse what is not a finite number in [low, high], or in (low, high] with ``above``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not low <= value <= high  # NaN is in no range
        or (above and value == low)
    ):
        bracket = "(" if above else "["
        raise SamplingError(
            f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}"
        )


def _integer(name: str, value: int, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise SamplingError(f"{name} must be an integer {bounds}, got {value!r}")
