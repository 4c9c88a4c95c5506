"""Sampling of a batch, with parameters and a random stream for each sequence.

The order is vLLM's:

1. log probabilities of the model's unmodified logits (``logprobs``);
2. allowed ids, bad words, end tokens before ``min_tokens``, the bits of constraints
   (``Ops.apply_bitmask``), bias, then the penalties for repetition, frequency and presence
   (``logits_processors``);
3. temperature, min-p, top-k, top-p and the draw (``Ops.sample``). With ``min_p_first=False``,
   min-p is applied last, as in transformers.

The random stream is keyed by (seed, token index), so batching, preemption and resuming do not
change the tokens. A step's inputs are copied to the device in two transfers, and its results are
copied back in one.

A row can be sampled if the largest of its edited logits is finite. That logit is not finite if the
model returned NaN or infinity, or if no finite logit is left. A single logit of -inf is a token
that is never drawn. The largest logit is copied to the host with the tokens. The greedy choice
computes it anyway; for a draw, the logits are read once more.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from functools import partial
from math import isfinite
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.device import ToHost, to_device
from idefics2_engine.outputs import TokenLogprobs
from idefics2_engine.sampling.draw_batch import DrawBatch
from idefics2_engine.sampling.logits_processors import EditFinder, LogitEdits
from idefics2_engine.sampling.logprob_bounds import likeliest
from idefics2_engine.sampling.logprobs import (
    Scores,
    make_token_logprobs,
    padded_rows,
    score,
    score_prompt,
)
from idefics2_engine.scheduling.sampling_columns import NO_LOGPROBS
from idefics2_engine.scheduling.sequence import Sequence
from idefics2_engine.structured.compiler import Words
from idefics2_kernels import Ops


class Choice(NamedTuple):
    """The next token of a sequence.

    Attributes:
        token_id: The token. It is undefined if the largest logit is not finite.
        logprobs: Log probabilities. None if they were not requested.
        largest_logit: Largest logit after the edits.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    largest_logit: float

    @property
    def is_finite(self) -> bool:
        """Whether the logits could be sampled."""
        return isfinite(self.largest_logit)


class Choices:
    """The next tokens of B sequences, as arrays and one by one.

    Attributes:
        token_ids: (B,) int64. A token is undefined if its row is not finite.
        is_finite: (B,) whether the logits could be sampled.
    """

    def __init__(
        self,
        token_ids: npt.NDArray[np.int64],
        largest: npt.NDArray[np.float32],
        logprobs: Mapping[int, TokenLogprobs],
    ) -> None:
        self.token_ids = token_ids
        self.is_finite = np.isfinite(largest)
        self._largest = largest
        self._logprobs = logprobs

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.token_ids)

    def __getitem__(self, row: int) -> Choice:
        """Return the choice of one row."""
        return Choice(int(self.token_ids[row]), self._logprobs.get(row), float(self._largest[row]))

    def __iter__(self) -> Iterator[Choice]:
        """Iterate over the rows."""
        return map(self.__getitem__, range(len(self)))


NO_CHOICES = Choices(np.zeros(0, np.int64), np.zeros(0, np.float32), {})
"""The choices of a step that draws no token."""


class Drawn:
    """A step's tokens on the device, with their copy to the host in progress.

    Args:
        token_ids: (B,) int64.
        largest: (B,) largest edited logit of each row.
        tops: Number of log probabilities by row, for rows that request them.
        scores: Log probabilities of these rows.
        text: Returns the text of a token.
    """

    def __init__(
        self,
        token_ids: Tensor,
        largest: Tensor,
        tops: dict[int, int],
        scores: Scores | None,
        text: Callable[[int], str],
    ) -> None:
        self.token_ids = token_ids
        self.scores = scores
        self._tops = tops
        self._text = text
        self._copy = ToHost([token_ids.int(), largest.float(), *(scores.tensors if scores else ())])

    def wait(self) -> None:
        """Wait for the device."""
        self._copy.wait()

    def choices(self) -> Choices:
        """Wait for the device and return one choice for each row."""
        token_ids, largest, *scored = self._copy.arrays()
        tops = self._tops
        places = make_token_logprobs(scored, [*tops.values()], self._text) if tops else []
        logprobs = dict(zip(tops, places, strict=True))
        return Choices(token_ids.astype(np.int64), largest, logprobs)


class Sampler:
    """Chooses the next token of every sequence of a step.

    Args:
        ops: Operations, of which ``apply_bitmask`` and ``sample`` are used.
        bad_words_ids: Token sequences that no answer may contain, even if they begin in the prompt.
        image_token_id: The image token, which is never penalized.
        text: Returns the text of a token, for log probabilities.
        min_p_first: Whether min-p is applied before top-k and top-p (vLLM) or after (transformers).
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

    @property
    def num_sequences(self) -> int:
        """Number of sequences with state kept between steps."""
        return self._edits.num_sequences

    def reads_answers(self, batch: DrawBatch) -> bool:
        """Return whether edits of the next logits depend on the tokens of ``batch``."""
        if any(len(word) > 1 for word in self.bad_words_ids):
            return len(batch.indices) > 0
        return bool(batch.columns["reads_answer"].any())

    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> list[Choice]:
        """Choose a token for each row of ``logits`` (B, V), possibly overwriting them."""
        return [*self.draw(logits, DrawBatch.of(sequences)).choices()]

    @torch.inference_mode()
    def draw(self, logits: Tensor, batch: DrawBatch, bits: Words | None = None) -> Drawn:
        """Launch the sampling of ``logits`` (B, V), possibly overwriting them, without waiting.

        ``bits`` (R, W) are those of the rows that have a constraint, in order.
        """
        V, number = logits.shape[1], batch.columns["logprobs"]
        rows = np.flatnonzero(number != NO_LOGPROBS)
        tops = {row: likeliest(int(number[row]), V) for row in rows.tolist()}
        greedy = not batch.columns["temperature"].any()
        edit_ids, edit_values = self._edits.find(batch, self.bad_words_ids, V)
        integers = [] if greedy else [batch.column("top_k"), batch.column("seed"), batch.indices]
        fractions = (
            [] if greedy else [batch.column(name) for name in ("temperature", "top_p", "min_p")]
        )
        ids = to_device([rows, *edit_ids, *integers], logits.device)
        values = to_device([*edit_values, *fractions], logits.device)
        split_ids, split_values = 1 + len(edit_ids), len(edit_values)

        raw = padded_rows(logits, ids[0]) if len(rows) else None
        bar = None if bits is None else partial(self._bar, batch=batch, bits=bits)
        logits = LogitEdits.of(ids[1:split_ids], values[:split_values]).apply(logits, bar)
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
        most = max(tops.values(), default=0)
        scores = None if raw is None else score(raw, tokens[ids[0]], most, V)
        return Drawn(tokens, largest, tops, scores, self.text)

    def _bar(self, logits: Tensor, batch: DrawBatch, bits: Words) -> None:
        """Bar the tokens that constraints do not allow."""
        places = np.flatnonzero(batch.columns["constrained"]).astype(np.int32)
        rows, words = to_device([places, bits.reshape(-1)], logits.device)
        self.ops.apply_bitmask(logits, rows, words.view(bits.shape))

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, token_ids: Items[int], number: int
    ) -> list[TokenLogprobs]:
        """Score a prompt, or a part of it, for ``Request.prompt_logprobs``.

        Args:
            logits: (T, V) unmodified logits at T consecutive positions.
            token_ids: (T,) tokens at the positions after these.
            number: Likeliest tokens to report for each; -1 for the whole vocabulary.

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
