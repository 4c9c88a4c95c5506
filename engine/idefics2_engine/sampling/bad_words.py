"""Token ids of bad words, both after a space and inside a word."""

from collections.abc import Sequence

from idefics2_engine.errors import PromptError, SamplingError, short_repr
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.sampling_params import SamplingParams

# A newline merges with no word, and the tokenizer adds no space after it
_BEFORE = "\n"


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of ``words`` with and without a space before, without duplicates.

    As in vLLM, leading spaces of a word are ignored, and control tokens are recognized. vLLM adds a
    space to get the second form. This tokenizer puts a space before every text, so the form without
    it is made from the text after a newline.

    Raises:
        SamplingError: The tokenizer fails on a word.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        try:
            before, spaced, inside = (
                tokenizer.encode(text, add_bos=False)
                for text in (_BEFORE, word.lstrip(" "), _BEFORE + word.lstrip(" "))
            )
        except PromptError as error:
            raise SamplingError(f"bad_words: {short_repr(word)}: {error}") from None
        found[tuple(spaced)] = None
        if inside[: len(before)] == before and len(inside) > len(before):
            found[tuple(inside[len(before) :])] = None
    return tuple(found)


def check_choice(
    params: SamplingParams,
    words: Sequence[Sequence[int]],
    eos_token_ids: frozenset[int],
    vocab_size: int,
) -> None:
    """Reject parameters that could leave no token to choose.

    Args:
        params: Sampling parameters of a request.
        words: Token ids of all bad words, each of which may bar its last token.
        eos_token_ids: End tokens of the checkpoint.
        vocab_size: Size of the model's vocabulary.

    Raises:
        SamplingError: Every allowed token may be barred.
    """
    barred = {word[-1] for word in words}
    if params.min_tokens:
        barred |= {*params.stop_token_ids} | (set() if params.ignore_eos else eos_token_ids)
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if all(token in barred for token in allowed):
        name = "bad_words" if params.allowed_token_ids is None else "allowed_token_ids"
        raise SamplingError(
            f"{name} must leave a token that is neither barred nor an end token before min_tokens, "
            f"got {short_repr(getattr(params, name))}"
        )
