"""Log probabilities and ranks of the sampled and the likeliest tokens.

They are computed in fp32 from the model's own logits. Tokens are ordered by logit and then by id,
so ranks and likeliest tokens do not depend on the batch or the device, even for ties.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.outputs import Logprob, TokenLogprobs
from idefics2_engine.prompts.tokenizer import Tokenizer

# Rows are padded to a multiple of this, so that all begin at the same alignment
_COLUMNS = 64
# Scoring so many rows of a prompt at once bounds the memory
_ROWS = 256


@dataclass(frozen=True)
class Scores:
    """Log probabilities of R positions on the device: the token's own, then the K likeliest.

    ``ranks`` are those of the tokens themselves.
    """

    token_ids: Tensor  # (R, 1 + K) int32
    logprobs: Tensor  # (R, 1 + K) fp32
    ranks: Tensor  # (R,) int32

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, for one transfer to the host."""
        return [self.token_ids, self.logprobs, self.ranks]


def padded_rows(logits: Tensor, rows: Tensor | slice) -> Tensor:
    """Copy ``rows`` of ``logits`` (B, V) to (R, W) fp32, padded with -inf to a multiple of 64."""
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

    This does not wait for the device.
    """
    order = _order(padded[:, :vocab_size])
    own = token_ids[:, None]
    ranks = (order > order.gather(1, own)).sum(1) + 1
    ids = torch.cat([own, order.topk(top, dim=1).indices], dim=1) if top else own
    logprobs = padded.log_softmax(-1).gather(1, ids)
    return Scores(ids.int(), logprobs, ranks.int())


def score_prompt(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Scores]:
    """Score the tokens that follow each of ``logits`` (T, V), 256 rows at a time."""
    followers = torch.tensor(token_ids, dtype=torch.int64).to(logits.device, non_blocking=True)
    return [
        score(padded_rows(some, slice(None)), ids, top, logits.shape[1])
        for some, ids in zip(logits.split(_ROWS), followers.split(_ROWS), strict=True)
    ]


def _order(logits: Tensor) -> Tensor:
    """Return int64 sort keys of ``logits`` (R, V) fp32: larger logits, then lower ids."""
    # Adding 0.0 turns -0.0 into 0.0
    bits = (logits + 0.0).view(torch.int32).long()
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ascending * 2**32 - torch.arange(logits.shape[1], device=logits.device)


def make_token_logprobs(
    arrays: Sequence[np.ndarray], tops: Sequence[int], text: Callable[[int], str]
) -> list[TokenLogprobs]:
    """Convert ``Scores.tensors`` on the host to a dict per row with ``tops`` (R,) likeliest."""
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
    """A cache of each token's text inside a longer text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """Return the text of ``token_id`` with its leading space.

        An incomplete character is U+FFFD.
        """
        text = self._texts.get(token_id)
        if text is None:
            # The decoder drops a text's leading space, so the second of two tokens shows it
            one, two = (
                self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2)
            )
            text = self._texts[token_id] = two[len(one) :]
        return text
