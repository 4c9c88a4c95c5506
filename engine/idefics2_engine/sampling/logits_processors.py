"""Edits of a batch's logits by sampling parameters, before temperature and filters.

The host lists (row, token) pairs, and the device applies each list to all rows at once. Only listed
elements are read and written, so a row without edits costs nothing. The order is: allowed ids, bad
words, end tokens before ``min_tokens``, constraints, bias, penalties. Neither bias nor penalty
changes -inf, so a barred token stays barred.

A token is barred by adding -inf to its logit, not by assigning it. NaN stays NaN and infinity
becomes NaN, so the largest edited logit shows whether all of the model's logits were finite.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.sampling.draw_batch import DrawBatch
from idefics2_engine.scheduling.sequence import Sequence

NEVER = float("-inf")
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LogitEdits:
    """Elements of logits (B, V) to edit, as rows (N,) and tokens (N,) for each kind of edit.

    Attributes:
        allowed_rows: (R,) rows restricted to the elements ``allowed``.
        allowed: Elements of these rows that stay.
        barred: Elements that become -inf.
        biased: Elements to which ``bias`` is added.
        penalized: Elements to which the penalties are applied.
        bias: (N,) fp32.
        repetition: (N,) fp32. Divides positive logits and multiplies others.
        frequency: (N,) fp32. Subtracted.
        presence: (N,) fp32. Subtracted.
    """

    allowed_rows: Tensor
    allowed: tuple[Tensor, Tensor]
    barred: tuple[Tensor, Tensor]
    biased: tuple[Tensor, Tensor]
    penalized: tuple[Tensor, Tensor]
    bias: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor

    @classmethod
    def of(cls, ids: Items[Tensor], values: Items[Tensor]) -> "LogitEdits":
        """Build from the device's copies of what ``EditFinder.find`` returns."""
        pairs = [(ids[i], ids[i + 1]) for i in range(1, 9, 2)]
        return cls(ids[0], *pairs, *values)  # type: ignore[arg-type]

    def apply(self, logits: Tensor, bar: Callable[[Tensor], None] | None = None) -> Tensor:
        """Return the edited ``logits`` (B, V), possibly in place.

        ``bar`` bars further tokens in place, before the bias.

        They are fp32 or wider if there is a bias or a penalty.
        """
        if len(self.bias) or len(self.repetition):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if len(self.allowed_rows):
            kept = logits[self.allowed]
            logits[self.allowed_rows] = logits[self.allowed_rows] + NEVER
            logits[self.allowed] = kept
        if len(self.barred[0]):
            logits[self.barred] = logits[self.barred] + NEVER
        if bar is not None:
            bar(logits)
        if len(self.bias):
            logits[self.biased] = logits[self.biased] + self.bias
        if len(self.repetition):
            values = logits[self.penalized]
            values = torch.where(values > 0, values / self.repetition, values * self.repetition)
            logits[self.penalized] = values - self.frequency - self.presence
        return logits


class EditFinder:
    """Finds the edits of a step.

    Tokens that are barred for every row are listed at once. Python runs only for sequences that ask
    for edits of their own, or if a bad word of the checkpoint has several tokens. The finder keeps
    the parameters and token counts of such a sequence for the lifetime of the sequence.
    """

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._requests: WeakKeyDictionary[Sequence, _Asked] = WeakKeyDictionary()

    @property
    def num_sequences(self) -> int:
        """Number of sequences with kept state."""
        return len(self._requests)

    def find(
        self, batch: DrawBatch, bad_words_ids: Items[Items[int]], vocab_size: int
    ) -> tuple[list[Ids], list[Floats]]:
        """Return the arguments of ``LogitEdits.of``; ``bad_words_ids`` apply to every row."""
        allowed_rows: list[int] = []
        allowed, barred, biased, penalized = (_Places() for _ in range(4))
        values: list[list[Floats]] = [[], [], [], []]
        single = [word[0] for word in bad_words_ids if len(word) == 1]
        longer = [word for word in bad_words_ids if len(word) > 1]
        asks = batch.columns["edits"] | (batch.indices < batch.columns["min_tokens"])
        rows = range(len(asks)) if longer else np.flatnonzero(asks).tolist()
        barred.add_to_all(len(asks), _known_tokens(single, vocab_size))
        for row in rows:
            sequence = batch.sequences[row]
            asked = self._requests.get(sequence)
            if asked is None:
                asked = self._requests[sequence] = _Asked(sequence, self.image_token_id)
            if len(asked.allowed):
                allowed_rows.append(row)
                allowed.add(row, asked.allowed)
            barred.add(row, _known_tokens(_barred(sequence, longer), vocab_size))
            biased.add(row, asked.biased)
            values[0].append(asked.bias)
            params = sequence.request.params
            if params.penalizes:
                tokens, counts = asked.seen(sequence)
                penalized.add(row, tokens)
                values[1].append(np.full(len(tokens), params.repetition_penalty, np.float32))
                values[2].append(np.float32(params.frequency_penalty) * counts)
                values[3].append(np.float32(params.presence_penalty) * (counts > 0))
        ids = [np.array(allowed_rows, dtype=np.int64)]
        for places in (allowed, barred, biased, penalized):
            ids += places.joined()
        return ids, [np.concatenate([*parts, np.zeros(0, np.float32)]) for parts in values]


class _Places:
    """A list of (row, token) pairs under construction."""

    def __init__(self) -> None:
        self._rows: list[Ids] = []
        self._tokens: list[Ids] = []

    def add(self, row: int, tokens: Ids) -> None:
        if len(tokens):
            self._rows.append(np.full(len(tokens), row))
            self._tokens.append(tokens)

    def add_to_all(self, count: int, tokens: Ids) -> None:
        """Add ``tokens`` to each of the first ``count`` rows."""
        if len(tokens):
            self._rows.append(np.repeat(np.arange(count), len(tokens)))
            self._tokens.append(np.tile(tokens, count))

    def joined(self) -> list[Ids]:
        if not self._rows:
            return [np.zeros(0, np.int64), np.zeros(0, np.int64)]
        return [np.concatenate(self._rows), np.concatenate(self._tokens)]


class _Asked:
    """A sequence's parameters as arrays, built once, and its token counts."""

    def __init__(self, sequence: Sequence, image_token_id: int) -> None:
        request, params = sequence.request, sequence.request.params
        bias = params.logit_bias or {}
        self.allowed: Ids = np.array(params.allowed_token_ids or (), dtype=np.int64)
        self.biased: Ids = np.array(list(bias), dtype=np.int64)
        self.bias: Floats = np.array(list(bias.values()), dtype=np.float32)
        # Prompt tokens count for the repetition penalty only. Image placeholders do not count
        prompt = {*request.prompt_token_ids} - {image_token_id}
        tokens = sorted(prompt) if params.repetition_penalty != 1.0 else []
        self._place = {token: place for place, token in enumerate(tokens)}
        room = len(tokens) + request.max_tokens if params.penalizes else 0
        self._tokens: Ids = np.zeros(room, dtype=np.int64)
        self._tokens[: len(tokens)] = tokens
        self._counts: Floats = np.zeros(room, dtype=np.float32)
        self._num_counted = len(request.prompt_token_ids)

    def seen(self, sequence: Sequence) -> tuple[Ids, Floats]:
        """Return the distinct tokens to penalize and their counts in the answer."""
        for token in sequence.token_ids[self._num_counted :]:
            place = self._place.setdefault(token, len(self._place))
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_counted = len(sequence.token_ids)
        used = len(self._place)
        return self._tokens[:used], self._counts[:used]


def _known_tokens(tokens: list[int], vocab_size: int) -> Ids:
    """Return ``tokens`` that exist; a config may name tokens beyond the vocabulary."""
    return np.array([token for token in tokens if token < vocab_size], dtype=np.int64)


def _barred(sequence: Sequence, bad_words_ids: Items[Items[int]]) -> list[int]:
    """Return the tokens that would complete a bad word or end ``sequence`` too early."""
    request, tokens = sequence.request, sequence.token_ids
    barred = [word[-1] for word in bad_words_ids if _ends_with(tokens, 0, word[:-1])]
    # Bad words of the request count only if they begin in the answer
    begin = len(request.prompt_token_ids)
    barred += [word[-1] for word in request.bad_words_ids if _ends_with(tokens, begin, word[:-1])]
    if sequence.num_drawn < request.params.min_tokens:
        barred.extend(sequence.end_token_ids)
    return barred


def _ends_with(tokens: list[int], begin: int, end: Items[int]) -> bool:
    """Return whether ``tokens[begin:]`` ends with ``end``."""
    return not end or (len(tokens) - begin >= len(end) and tokens[-len(end) :] == list(end))
