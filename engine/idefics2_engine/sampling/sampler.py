"""Logits to tokens for a batch, each sequence by its own parameters and random stream.

In this order, vLLM's:

1. log probabilities to report, of the logits as the model gave them (``logprobs``);
2. allowed ids, bad words, end tokens before ``min_tokens``, bias, then the penalties for repetition, frequency and
   presence (``logits_processors``);
3. temperature, min-p, top-k, top-p and the draw (``Ops.sample``); with ``min_p_first=False`` min-p comes last, as in
   transformers.

The stream is keyed by (seed, token index), so batching, preemption and resuming cannot change what
is drawn. What a step needs goes to the device in two copies, and all that is asked for comes back
in one.

A row can be sampled if the largest of its edited logits is finite. It is not if any logit of the
model is NaN or infinity (edits keep both visible), or if no finite logit is left. A single logit of
-inf is a token that is never drawn. The largest logit comes to the host with the tokens: the greedy
choice computes it anyway, and a draw reads the logits once more for it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import ToHost, to_device
from idefics2_engine.outputs import TokenLogprobs
from idefics2_engine.sampling.logits_processors import EditFinder, LogitEdits
from idefics2_engine.sampling.logprobs import (
    Scores,
    likeliest,
    make_token_logprobs,
    padded_rows,
    score,
    score_prompt,
)
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Sequence
from idefics2_kernels import Ops


class Choice(NamedTuple):
    """The next token of a sequence."""

    token_id: int  # means nothing if the largest logit is not finite
    logprobs: TokenLogprobs | None  # if asked for
    largest_logit: float  # after edits

    @property
    def is_finite(self) -> bool:
        """Whether the logits could be sampled."""
        return isfinite(self.largest_logit)


class Drawn:
    """A step's tokens, on the device and on their way to the host."""

    def __init__(
        self,
        token_ids: Tensor,  # (B,) int64
        largest: Tensor,  # (B,), each row's largest edited logit
        tops: list[int | None],  # log probabilities that each row asks for
        scores: Scores | None,  # of the rows that ask
        text: Callable[[int], str],
    ) -> None:
        self.token_ids = token_ids
        self.scores = scores
        self._tops = tops
        self._text = text
        self._copy = ToHost([token_ids.int(), largest.float(), *(scores.tensors if scores else ())])

    def choices(self) -> list[Choice]:
        """Wait for the device and return one choice a row."""
        token_ids, largest, *scored = self._copy.arrays()
        asked = [top for top in self._tops if top is not None]
        places = iter(make_token_logprobs(scored, asked, self._text) if asked else ())
        return [
            Choice(token, None if top is None else next(places), logit)
            for token, logit, top in zip(
                token_ids.tolist(), largest.tolist(), self._tops, strict=True
            )
        ]


class Sampler:
    """Chooses the next token of every sequence of a step.

    Args:
        ops: Operations; ``sample`` is used.
        bad_words_ids: Token sequences that no answer may have; one may begin in the prompt.
        image_token_id: Stands for an image in prompts; never penalized.
        text: Text of a token, for log probabilities.
        min_p_first: Whether min-p goes before top-k and top-p (vLLM) or after (transformers).
    """

    def __init__(
        self,
        ops: Ops,
        bad_words_ids: Items[Items[int]],
        image_token_id: int,
        text: Callable[[int], str],
        *,
        min_p_first: bool = True,
    ) -> None:
        self.ops = ops
        self.bad_words_ids = [list(word) for word in bad_words_ids]
        self.text = text
        self.min_p_first = min_p_first
        self._edits = EditFinder(image_token_id)

    def reads_answer(self, sequence: Sequence) -> bool:
        """Say whether the next token depends on the last ones otherwise than through the logits."""
        words = (*self.bad_words_ids, *sequence.request.bad_words_ids)
        return sequence.request.params.penalizes or any(len(word) > 1 for word in words)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Choice]:
        """Choose a token for each row of ``logits`` (B, V), which may be overwritten."""
        return self.draw(logits, sequences).choices()

    @torch.inference_mode()
    def draw(self, logits: Tensor, sequences: list[Sequence]) -> Drawn:
        """Launch the sampling of ``logits`` (B, V), which may be overwritten, and return."""
        V, params = logits.shape[1], [sequence.request.params for sequence in sequences]
        tops = [None if p.logprobs is None else likeliest(p.logprobs, V) for p in params]
        rows = np.array([row for row, top in enumerate(tops) if top is not None], dtype=np.int64)
        greedy = all(p.temperature == 0 for p in params)
        edit_ids, edit_values = self._edits.find(sequences, self.bad_words_ids, V)
        integers = [] if greedy else _integers(params, sequences)
        fractions = [] if greedy else _fractions(params)
        ids = to_device([rows, *edit_ids, *integers], logits.device)
        values = to_device([*edit_values, *fractions], logits.device)
        split_ids, split_values = 1 + len(edit_ids), len(edit_values)

        raw = padded_rows(logits, ids[0]) if len(rows) else None
        logits = LogitEdits.of(ids[1:split_ids], values[:split_values]).apply(logits)
        if greedy:
            largest, tokens = logits.max(-1)
        else:
            top_k, seed, index = ids[split_ids:]
            temperature, top_p, min_p = values[split_values:]
            largest = logits.amax(-1)
            tokens = self.ops.sample(
                logits,
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                index,
                min_p_first=self.min_p_first,
            )
        most = max((top for top in tops if top is not None), default=0)
        scores = None if raw is None else score(raw, tokens[ids[0]], most, V)
        return Drawn(tokens, largest, tops, scores, self.text)

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, token_ids: Items[int], number: int
    ) -> list[TokenLogprobs]:
        """Score a prompt, or a part of it, for ``Request.prompt_logprobs``.

        Args:
            logits: As the model gave them at T places in a row, (T, V).
            token_ids: The tokens (T) at the places behind these.
            number: Of the likeliest tokens to report beside each; -1 for the whole vocabulary.

        Raises:
            FloatingPointError: A row has no probabilities, because a logit is NaN or infinity or
                all are -inf.
        """
        if len(logits) != len(token_ids):
            raise ValueError(
                f"token_ids must be as many as logits {len(logits)}, got {len(token_ids)}"
            )
        if not token_ids:
            return []
        top = likeliest(number, logits.shape[1])
        parts = score_prompt(logits, token_ids, top)
        scores = [torch.cat(some) for some in zip(*(part.tensors for part in parts), strict=True)]
        arrays = ToHost(scores).arrays()
        if np.isnan(arrays[1]).any():
            raise FloatingPointError("logits must be finite, got log probabilities that are NaN")
        return make_token_logprobs(arrays, [top] * len(token_ids), self.text)


def _integers(params: list[SamplingParams], sequences: list[Sequence]) -> list[np.ndarray]:
    """Return top-k, seed and token index of each row."""
    return [
        np.array([max(p.top_k, 0) for p in params], dtype=np.int64),
        np.array([sequence.seed for sequence in sequences], dtype=np.int64),
        np.array([sequence.num_drawn for sequence in sequences], dtype=np.int64),
    ]


def _fractions(params: list[SamplingParams]) -> list[np.ndarray]:
    """Return temperature, top-p and min-p of each row."""
    columns = zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
    return [np.array(column, dtype=np.float32) for column in columns]
