"""Bounds on the log probabilities of a request, which are checked before it has any."""

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.sampling_params import SamplingParams

# Every request may ask for so many likeliest tokens, which is vLLM's default limit
_ALWAYS = 20
# Bound for requests that ask for more. An entry takes about 180 bytes, so all take 94 MB
_MOST_ENTRIES = 2**19


def check_entries(params: SamplingParams, prompt_tokens: int, new_tokens: int, vocab: int) -> None:
    """Reject requests for more log probabilities than memory allows.

    Args:
        params: Sampling parameters of a request.
        prompt_tokens: Tokens of its prompt.
        new_tokens: Most tokens of each answer.
        vocab: Size of the vocabulary, which -1 stands for.

    Raises:
        SamplingError: More than 20 likeliest tokens per position are requested, and all positions
            together would have too many entries.
    """
    scored = prompt_tokens - max(1, params.prompt_logprobs_start)
    places = {"logprobs": params.n * new_tokens, "prompt_logprobs": scored}
    for name, count in places.items():
        number = getattr(params, name) or 0
        top = likeliest(number, vocab)
        if top > _ALWAYS and count * (1 + top) > _MOST_ENTRIES:
            raise SamplingError(
                f"{name} must be at most {max(_ALWAYS, _MOST_ENTRIES // count - 1)} for {count} tokens, got {short_repr(number)}: "
                f"above {_ALWAYS} the tokens with their likeliest may have {_MOST_ENTRIES} entries"
            )


def likeliest(number: int, vocab: int) -> int:
    """Return the number of tokens for ``SamplingParams.logprobs``: -1 is the vocabulary."""
    return vocab if number == -1 else number
