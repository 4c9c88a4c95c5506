"""transformers' processors and criteria as parameters of the engine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from idefics2_engine.errors import SamplingError
from idefics2_engine.hf.generation.obstacles import NotOnEngineError
from idefics2_engine.sampling_params import SamplingParams

_BadWords = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sampling:
    """How the answers to all rows are drawn and when they end.

    Attributes:
        params: Parameters of the engine, without a length.
        bad_words_ids: Token ids of bad words.
        max_length: Most tokens of a padded row.
        has_end: Whether end tokens end an answer.
    """

    params: SamplingParams
    bad_words_ids: _BadWords
    max_length: int
    has_end: bool


def read_sampling(
    config: GenerationConfig,
    logits_processor: Iterable[Any],
    stopping_criteria: Iterable[Any],
    width: int,
    vocab_size: int,
) -> Sampling:
    """Translate what transformers prepared for rows of ``width`` tokens.

    Raises:
        NotOnEngineError: A processor, a criterion or a value is none of the engine's.
    """
    values: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    bad_words: _BadWords = ()
    least = 0
    for one in logits_processor:
        kind = type(one)
        if kind is processors.TemperatureLogitsWarper:
            values["temperature"] = float(one.temperature)
        elif kind is processors.TopKLogitsWarper:
            values["top_k"] = int(one.top_k)
        elif kind is processors.TopPLogitsWarper:
            values["top_p"] = float(one.top_p)
        elif kind is processors.MinPLogitsWarper:
            values["min_p"] = float(one.min_p)
        elif kind is processors.RepetitionPenaltyLogitsProcessor:
            values["repetition_penalty"] = float(one.penalty)
        elif kind is processors.NoBadWordsLogitsProcessor:
            # The end tokens, which may stand among the words, are not among the biases
            bad_words = tuple(tuple(map(int, word)) for word in one.sequence_bias)
        elif kind is processors.MinLengthLogitsProcessor:
            least = max(least, int(one.min_length) - width)
        elif kind is processors.MinNewTokensLengthLogitsProcessor:
            least = max(least, int(one.min_new_tokens))
        else:
            raise NotOnEngineError(f"{kind.__name__} needs transformers' loop")
    longest, ends, stops = _ends(stopping_criteria)
    if longest is None:
        raise NotOnEngineError("a call without a length needs transformers' loop")
    if stops and least:
        raise NotOnEngineError("stop_strings before min_new_tokens need transformers' loop")
    try:
        params = SamplingParams(
            n=config.num_return_sequences or 1,
            max_tokens=None,
            min_tokens=max(least, 0),
            stop=stops,
            stop_token_ids=[token for token in ends or () if token < vocab_size],
            skip_special_tokens=False,
            **values,
        )
    except SamplingError as error:
        raise NotOnEngineError(str(error)) from error
    return Sampling(params, bad_words, longest, ends is not None)


def _ends(found: Iterable[Any]) -> tuple[int | None, list[int] | None, tuple[str, ...]]:
    """Return the largest length, the end tokens and the stop strings of criteria."""
    longest: int | None = None
    ends: list[int] | None = None
    stops: tuple[str, ...] = ()
    for one in found:
        kind = type(one)
        if kind is criteria.MaxLengthCriteria:
            longest = int(one.max_length)
        elif kind is criteria.EosTokenCriteria:
            ends = one.eos_token_id.flatten().tolist()
        elif kind is criteria.StopStringCriteria:
            stops = tuple(one.stop_strings)
        else:
            raise NotOnEngineError(f"{kind.__name__} needs transformers' loop")
    return longest, ends, stops
