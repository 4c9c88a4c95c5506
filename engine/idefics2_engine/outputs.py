"""Outputs of requests, modeled on vLLM's."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.images.image_info import ImageInfo

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of a token by the model's own logits, before any sampling parameter.

    Attributes:
        logprob: Natural logarithm. -inf if the token's logit is -inf.
        rank: Position among all tokens by likelihood, from 1. Ties are ordered by id.
        decoded_token: Text of the token inside a longer text: a leading space is kept.
    """

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Log probabilities by token id: the token of a position, then the requested likeliest ones."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a request.

    Attributes:
        index: Index among the ``n`` answers.
        text: Text of the answer.
        token_ids: Generated tokens, including an end token.
        cumulative_logprob: Sum over all tokens. None if no log probabilities were requested.
        logprobs: Log probabilities of each token. None if none were requested.
        finish_reason: None while the answer is unfinished.
        stop_reason: Stop token or stop string. None for an end token of the checkpoint.
        parsed: The value of an answer in JSON (``structured_outputs``), as an object of the class of
            pydantic if one was given. None for other answers and for one that was cut off.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    parsed: Any = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request, in seconds of ``time.monotonic``."""

    arrival_time: float
    first_token_time: float | None
    finished_time: float | None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers so far.

    Attributes:
        request_id: Identifier of the request.
        prompt: Text of the prompt, with each image as one "<image>". It is decoded from the token
            ids if those were given.
        prompt_token_ids: Token ids of the prompt, with placeholders expanded.
        prompt_logprobs: Log probabilities of each prompt token; None for the first token. None if
            they were not requested.
        outputs: The answers.
        finished: Whether no more tokens follow.
        metrics: Times of the request.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        error: Why the request failed. None if it did not.
        key: Key of the ``Row``. None if the prompt had none.
        num_image_tokens: Prompt tokens that stand for images.
        num_patches: Patches of the images, which the vision tower encodes.
        image_info: What is known of each image of the prompt, in order.
    """

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int
    error: Idefics2Error | None = None
    key: str | int | None = None
    num_image_tokens: int = 0
    num_patches: int = 0
    image_info: tuple[ImageInfo, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the output as data for ``json.dumps``.

        An error becomes ``{"code": …, "message": …}``. A log probability of minus infinity becomes
        ``None``, because JSON has no infinity.
        """
        error = None if self.error is None else self.error.to_dict()
        # ``asdict`` would copy objects of the caller's class
        outputs = [replace(output, parsed=None) for output in self.outputs]
        plain = asdict(replace(self, error=None, outputs=outputs))
        data: dict[str, Any] = _without_infinity(plain)
        for written, output in zip(data["outputs"], self.outputs, strict=True):
            written["parsed"] = _plain(output.parsed)
        return {**data, "error": error}


def _plain(parsed: Any) -> Any:
    """Return an object of a class of pydantic as data for JSON, and other data as it is."""
    dump = getattr(parsed, "model_dump", None)
    return _without_infinity(dump(mode="json") if callable(dump) else parsed)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value


class RowOutputs(Iterator[RequestOutput]):
    """The iterator that ``LLM.iterate`` returns: outputs in the order in which they finish."""

    def __init__(
        self, outputs: Generator[RequestOutput, None, None], drain: Callable[[], None]
    ) -> None:
        self._outputs = outputs
        self._drain = drain

    def __next__(self) -> RequestOutput:
        """Return the next output.

        Raises:
            Exception: The source of the rows raised it, and all rows before are answered.
        """
        return next(self._outputs)

    def drain(self) -> None:
        """Read no more rows; the iterator ends after the outputs of rows that were read.

        Any thread and any signal handler may call this, also while the iterator waits. It returns
        at once. A row that the source yields at that moment or later is dropped.
        """
        self._drain()

    def close(self) -> None:
        """End the iterator and cancel the requests in flight; idempotent.

        Raises:
            ValueError: Another thread, or the code that a signal handler interrupted, is waiting
                for the next output.
        """
        self._outputs.close()


def failed_output(
    request_id: str, error: Idefics2Error, key: str | int | None = None
) -> RequestOutput:
    """Return the output of a request that could not be started."""
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
        key=key,
    )
