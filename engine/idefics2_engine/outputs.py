"""What a request gives back, in vLLM's shape."""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from idefics2_engine.errors import Idefics2Error

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found a token, before penalties, filters and temperature."""

    logprob: float  # natural logarithm; -inf where the model rules the token out
    rank: int  # place among all tokens by likelihood, from 1; of equal ones the lower id goes first
    decoded_token: str  # as inside a text: a word's leading space is kept


TokenLogprobs = dict[int, Logprob]
"""By id: the token at a place, then the likeliest that were asked for, in order."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a request."""

    index: int  # which of the n answers
    text: str
    token_ids: list[int]  # an end token included
    cumulative_logprob: float | None  # of all tokens; None: log probabilities were not asked for
    logprobs: list[TokenLogprobs] | None  # of each token
    finish_reason: FinishReason | None  # None while the answer grows
    stop_reason: int | str | None  # the stop token or string; None for the checkpoint's end token


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds of ``time.monotonic``."""

    arrival_time: float
    first_token_time: float | None
    finished_time: float | None


@dataclass(frozen=True)
class RequestOutput:
    """A request with its answers so far."""

    request_id: str
    prompt: str  # each image as one "<image>"; decoded where token ids were given
    prompt_token_ids: list[int]  # placeholders written out
    prompt_logprobs: list[TokenLogprobs | None] | None  # of each prompt token; the first has none
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int  # prompt tokens taken from a prefix cache
    error: Idefics2Error | None = None  # why there is no whole answer

    def to_dict(self) -> dict[str, Any]:
        """Return the output as data that ``json.dumps`` takes.

        An error becomes ``{"code": …, "message": …}``. A log probability of minus infinity becomes
        ``None``, because JSON has no infinity.
        """
        error = None if self.error is None else self.error.to_dict()
        data: dict[str, Any] = _without_infinity(asdict(replace(self, error=None)))
        return {**data, "error": error}


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def failed_output(request_id: str, error: Idefics2Error) -> RequestOutput:
    """Describe a request that could not be begun."""
    now = time.monotonic()
    return RequestOutput(
        request_id=request_id,
        prompt="",
        prompt_token_ids=[],
        prompt_logprobs=None,
        outputs=[],
        finished=True,
        metrics=RequestMetrics(arrival_time=now, first_token_time=None, finished_time=now),
        num_cached_tokens=0,
        error=error,
    )
