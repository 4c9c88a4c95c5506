"""Log probabilities of the sampled and the likeliest tokens, with ranks from the row alone.

They are those of the model's own logits, in fp32. Tokens are ordered by logit and then by id, so
that ranks and the likeliest tokens are the same for every batch and on every device, ties included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.errors import SamplingError, short_repr
from idefics2_engine.outputs import Logprob, TokenLogprobs
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.sampling_params import SamplingParams

_COLUMNS = 64  # rows are filled up to whole multiples, so that each begins at the same alignment
_ROWS = 256  # of a prompt, that are scored at once: bounds the memory
_ALWAYS = 20  # likeliest tokens beside each that every request may have, as by vLLM's default
# Of a request that asks for more: an entry takes some 180 bytes, so 94 MB; 16 tokens with a
# vocabulary of 32,003
_MOST_ENTRIES = 2**19


@dataclass(frozen=True)
class Scores:
    """Log probabilities of R places on the device: the token's own, then the K likeliest."""

    token_ids: Tensor  # (R, 1 + K) int32
    logprobs: Tensor  # (R, 1 + K) fp32
    ranks: Tensor  # (R,) int32, of the token itself

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, for one transfer to the host."""
        return [self.token_ids, self.logprobs, self.ranks]


def check_entries(params: SamplingParams, prompt_tokens: int, new_tokens: int, vocab: int) -> None:
    """Refuse log probabilities that would fill the memory.

    Args:
        params: Of a request.
        prompt_tokens: Tokens of its prompt.
        new_tokens: Tokens that each of its answers may have.
        vocab: Tokens of the model, which -1 stands for.

    Raises:
        SamplingError: More than 20 likeliest tokens are asked for at so many places that they are
            too many.
    """
    places = {"logprobs": params.n * new_tokens, "prompt_logprobs": prompt_tokens - 1}
    for name, count in places.items():
        number = getattr(params, name) or 0
        top = likeliest(number, vocab)
        if top > _ALWAYS and count * (1 + top) > _MOST_ENTRIES:
            raise SamplingError(
                f"{name} must be at most {max(_ALWAYS, _MOST_ENTRIES // count - 1)} for {count} tokens, got {short_repr(number)}: "
                f"above {_ALWAYS} the tokens with their likeliest may have {_MOST_ENTRIES} entries"
            )


def likeliest(number: int, vocab: int) -> int:
    """Return how many tokens ``number`` of ``SamplingParams.logprobs`` means."""
    return vocab if number == -1 else number


def padded_rows(logits: Tensor, rows: Tensor | slice) -> Tensor:
    """Copy ``rows`` of ``logits`` (B, V) to (R, W) fp32, padded with -inf to whole blocks."""
    V = logits.shape[1]
    taken = logits[rows]
    out = torch.full(
        (len(taken), -(-V // _COLUMNS) * _COLUMNS),
        float("-inf"),
        dtype=torch.float32,
        device=logits.device,
    )
    out[:, :V] = taken
    return out


def score(padded: Tensor, token_ids: Tensor, top: int, vocab_size: int) -> Scores:
    """Score ``token_ids`` (R,) int64 and the ``top`` likeliest by ``padded_rows`` (R, W).

    Nothing waits for the device.
    """
    order = _order(padded[:, :vocab_size])
    own = token_ids[:, None]
    ranks = (order > order.gather(1, own)).sum(1) + 1
    ids = torch.cat([own, order.topk(top, dim=1).indices], dim=1) if top else own
    logprobs = padded.log_softmax(-1).gather(1, ids)
    return Scores(ids.int(), logprobs, ranks.int())


def score_prompt(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Scores]:
    """Score the tokens that follow each of ``logits`` (T, V), some rows at a time."""
    followers = torch.tensor(token_ids, dtype=torch.int64).to(logits.device, non_blocking=True)
    return [
        score(padded_rows(some, slice(None)), ids, top, logits.shape[1])
        for some, ids in zip(logits.split(_ROWS), followers.split(_ROWS), strict=True)
    ]


def _order(logits: Tensor) -> Tensor:
    """Return an int64 key for each of ``logits`` (R, V) fp32: by logit, then the lowest id."""
    bits = (logits + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ascending * 2**32 - torch.arange(logits.shape[1], device=logits.device)


def make_token_logprobs(
    arrays: Sequence[np.ndarray], tops: Sequence[int], text: Callable[[int], str]
) -> list[TokenLogprobs]:
    """Turn ``Scores.tensors`` on the host into ``tops`` (R,) log probabilities for each row."""
    ids, logprobs, ranks = (array.tolist() for array in arrays)
    places = []
    for own_rank, top, row_ids, row_logprobs in zip(ranks, tops, ids, logprobs, strict=True):
        place: TokenLogprobs = {}
        for rank, token, logprob in zip(
            (own_rank, *range(1, top + 1)), row_ids, row_logprobs, strict=False
        ):
            place.setdefault(token, Logprob(logprob, rank, text(token)))
        places.append(place)
    return places


class TokenTexts:
    """The text of each token as it stands inside a text, looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """Return the text of ``token_id``, its leading space kept.

        Part of a character is U+FFFD.
        """
        text = self._texts.get(token_id)
        if text is None:
            # the decoder drops the space that begins a text, so a second one shows it
            one, two = (
                self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2)
            )
            text = self._texts[token_id] = two[len(one) :]
        return text
