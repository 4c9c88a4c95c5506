"""Parameters of sampling and stopping, with vLLM's names, validated on construction."""

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
from idefics2_engine.structured.params import StructuredOutputsParams, read_structured_outputs

# Dividing or multiplying by far larger numbers would overflow fp32 logits
_LARGEST = 1e6
# vLLM's limit of answers to one prompt
_MOST_ANSWERS = 16384
# OpenAI's limit
_LARGEST_BIAS = 100.0
_TOKEN_ID = Whole(0)


def _biases(values: object) -> dict[int, float]:
    """Accept a mapping from token ids, which are strings in JSON, to numbers."""
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
    """Accept a non-empty string that UTF-8 can encode."""
    if not isinstance(value, str) or not value or not _is_unicode(value):
        raise MismatchError("not empty and writable in UTF-8", short_repr(value))
    return value


def _word(value: object) -> str:
    """Accept a string that has more than spaces and that UTF-8 can encode."""
    if not isinstance(value, str) or not value.strip(" ") or not _is_unicode(value):
        raise MismatchError("more than spaces and writable in UTF-8", short_repr(value))
    return value


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        # The string has half of a surrogate pair
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping parameters of one request.

    Attributes:
        temperature: Divides the logits. 0 always selects the most likely token.
        top_p: Keep the most likely tokens whose probabilities sum to this. 1 keeps all.
        top_k: Keep this many most likely tokens. 0 or -1 keeps all.
        min_p: Keep tokens with at least this fraction of the highest probability.
        repetition_penalty: For tokens in the prompt or the answer, divide positive logits by this
            and multiply negative ones. Image tokens are exempt.
        presence_penalty: Subtract this, from -2 to 2, from the logits of tokens in the answer.
        frequency_penalty: Subtract this, from -2 to 2, for each occurrence of a token in the
            answer.
        logit_bias: Values from -100 to 100 to add to logits, by token id.
        allowed_token_ids: The only tokens to choose from. All if ``None``.
        bad_words: Words that the answer must not contain, at the start of a word or inside one. The
            last token of such a word is never chosen. A string is one word.
        seed: Seed of the request's random stream. If ``None``, drawn from the engine's seed.
        n: Number of answers.
        max_tokens: Most tokens to generate. If ``None``, up to the model's length.
        min_tokens: Tokens to generate before the answer may end.
        stop: Strings that end the answer, or one string.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Continue after an end token of the checkpoint.
        skip_special_tokens: Omit control tokens from the text.
        logprobs: Number of most likely tokens to report at each position of the answer, in addition
            to the chosen one. -1 means the whole vocabulary. Above 20, all positions of a request's
            answers together may have 524,288 entries: 16 positions of a vocabulary of 32,003. The
            values are from the model's logits, before the parameters above. If ``None``, no log
            probabilities are reported.
        prompt_logprobs: The same for each position of the prompt except the first.
        prompt_logprobs_start: First position of the prompt to report, from 0. What the prefix cache
            has of earlier positions is not computed again.
        structured_outputs: What the answer must be, or a mapping of it: JSON of a schema, one of
            some texts, a regex or a grammar. If ``None``, any text.

    Raises:
        SamplingError: A value is out of range or of the wrong type.
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
    prompt_logprobs_start: int = checked(Whole(0), 0)
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = checked(
        OrNone(read_structured_outputs), None
    )

    def __post_init__(self) -> None:
        """Check every bound and convert numbers of other libraries to Python's types."""
        check_fields(self, SamplingError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens {short_repr(self.max_tokens)}, "
                f"got {short_repr(self.min_tokens)}"
            )
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise SamplingError(
                "prompt_logprobs_start must be 0 without prompt_logprobs, "
                f"got {short_repr(self.prompt_logprobs_start)}"
            )
        if self.structured_outputs is not None:
            # With them an answer could end before it satisfies the constraint, or be another text
            for name in ("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"):
                if getattr(self, name):
                    raise SamplingError(
                        f"{name} must be absent with structured_outputs, "
                        f"got {short_repr(getattr(self, name))}"
                    )

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """``structured_outputs``, which is no mapping any more."""
        constraint = self.structured_outputs
        assert constraint is None or isinstance(constraint, StructuredOutputsParams)
        return constraint

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from parsed JSON, where an unknown name is invalid input, not a ``TypeError``.

        Raises:
            SamplingError: A name is unknown, or a value is out of range or of the wrong type.
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
        """Reject token ids and counts that exceed a vocabulary of ``vocab_size`` tokens.

        Raises:
            SamplingError: A token id is not below ``vocab_size``, or more than ``vocab_size`` log
                probabilities are requested.
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
