"""What the parameters of a batch change in its logits, before temperature and filters.

The host lists (row, token) pairs, and the device applies each list to all rows at once: only listed
places are read and written, and a row that asks for nothing costs nothing. In this order: allowed
ids, bad words, end tokens that come too early, bias, penalties. What is barred stays so, because
neither bias nor penalty moves -inf.

A token is barred by adding -inf to its logit, not by writing it there: NaN stays NaN and infinity
becomes NaN, so the largest edited logit still tells whether all logits of the model could be used.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.scheduling.sequence import Sequence

NEVER = float("-inf")
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LogitEdits:
    """Places to change in logits (B, V), by row and token: N of each kind."""

    allowed_rows: Tensor  # (R,): rows that choose among allowed places only
    allowed: tuple[Tensor, Tensor]
    barred: tuple[Tensor, Tensor]
    biased: tuple[Tensor, Tensor]
    penalized: tuple[Tensor, Tensor]
    bias: Tensor  # (N,) fp32: added
    repetition: Tensor  # (N,) fp32: divides a positive logit, multiplies another
    frequency: Tensor  # (N,) fp32: subtracted
    presence: Tensor  # (N,) fp32: subtracted

    @classmethod
    def of(cls, ids: Items[Tensor], values: Items[Tensor]) -> "LogitEdits":
        """Take the tensors of ``EditFinder.find``, in its order."""
        pairs = [(ids[i], ids[i + 1]) for i in range(1, 9, 2)]
        return cls(ids[0], *pairs, *values)  # type: ignore[arg-type]

    def apply(self, logits: Tensor) -> Tensor:
        """Return the edited ``logits`` (B, V), which may be overwritten.

        They are fp32 or wider if more than masks was asked for.
        """
        if len(self.bias) or len(self.repetition):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if len(self.allowed_rows):
            kept = logits[self.allowed]
            logits[self.allowed_rows] = logits[self.allowed_rows] + NEVER
            logits[self.allowed] = kept
        if len(self.barred[0]):
            logits[self.barred] = logits[self.barred] + NEVER
        if len(self.bias):
            logits[self.biased] = logits[self.biased] + self.bias
        if len(self.repetition):
            values = logits[self.penalized]
            values = torch.where(values > 0, values / self.repetition, values * self.repetition)
            logits[self.penalized] = values - self.frequency - self.presence
        return logits


class EditFinder:
    """Lists the edits of a step.

    Keeps a history of each sequence that is penalized, as long as the sequence lives.
    """

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._requests: WeakKeyDictionary[Sequence, _Asked] = WeakKeyDictionary()

    def find(
        self, sequences: list[Sequence], bad_words_ids: Items[Items[int]], vocab_size: int
    ) -> tuple[list[Ids], list[Floats]]:
        """List what ``LogitEdits.of`` takes; ``bad_words_ids`` are barred in every row."""
        allowed_rows: list[int] = []
        allowed, barred, biased, penalized = (_Places() for _ in range(4))
        values: list[list[Floats]] = [[], [], [], []]
        for row, sequence in enumerate(sequences):
            asked = self._requests.get(sequence)
            if asked is None:
                asked = self._requests[sequence] = _Asked(sequence, self.image_token_id)
            if len(asked.allowed):
                allowed_rows.append(row)
                allowed.add(row, asked.allowed)
            # a config may name tokens that a smaller vocabulary does not have
            never = [token for token in _barred(sequence, bad_words_ids) if token < vocab_size]
            barred.add(row, np.array(never, dtype=np.int64))
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
    """(row, token) pairs, row by row."""

    def __init__(self) -> None:
        self._rows: list[Ids] = []
        self._tokens: list[Ids] = []

    def add(self, row: int, tokens: Ids) -> None:
        if len(tokens):
            self._rows.append(np.full(len(tokens), row))
            self._tokens.append(tokens)

    def joined(self) -> list[Ids]:
        if not self._rows:
            return [np.zeros(0, np.int64), np.zeros(0, np.int64)]
        return [np.concatenate(self._rows), np.concatenate(self._tokens)]


class _Asked:
    """What a sequence's parameters ask for, as arrays made once, and its counts of tokens."""

    def __init__(self, sequence: Sequence, image_token_id: int) -> None:
        request, params = sequence.request, sequence.request.params
        bias = params.logit_bias or {}
        self.allowed: Ids = np.array(params.allowed_token_ids or (), dtype=np.int64)
        self.biased: Ids = np.array(list(bias), dtype=np.int64)
        self.bias: Floats = np.array(list(bias.values()), dtype=np.float32)
        # the prompt counts for repetition alone; placeholders are not text that is repeated
        prompt = {*request.prompt_token_ids} - {image_token_id}
        tokens = sorted(prompt) if params.repetition_penalty != 1.0 else []
        self._place = {token: place for place, token in enumerate(tokens)}
        room = len(tokens) + request.max_tokens if params.penalizes else 0
        self._tokens: Ids = np.zeros(room, dtype=np.int64)
        self._tokens[: len(tokens)] = tokens
        self._counts: Floats = np.zeros(room, dtype=np.float32)
        self._num_counted = len(request.prompt_token_ids)

    def seen(self, sequence: Sequence) -> tuple[Ids, Floats]:
        """Return the tokens to penalize, each once, and their counts: 0 for the prompt's own."""
        for token in sequence.token_ids[self._num_counted :]:
            place = self._place.setdefault(token, len(self._place))
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_counted = len(sequence.token_ids)
        used = len(self._place)
        return self._tokens[:used], self._counts[:used]


def _barred(sequence: Sequence, bad_words_ids: Items[Items[int]]) -> list[int]:
    """Return the tokens that would complete a bad word or end ``sequence`` too early."""
    request, tokens = sequence.request, sequence.token_ids
    barred = [word[-1] for word in bad_words_ids if _ends_with(tokens, 0, word[:-1])]
    begin = len(request.prompt_token_ids)  # a word that was asked for may begin in the answer only
    barred += [word[-1] for word in request.bad_words_ids if _ends_with(tokens, begin, word[:-1])]
    if sequence.num_drawn < request.params.min_tokens:
        barred.extend(sequence.end_token_ids)
    return barred


def _ends_with(tokens: list[int], begin: int, end: Items[int]) -> bool:
    """Tell whether ``tokens`` from ``begin`` on end with ``end``."""
    return not end or (len(tokens) - begin >= len(end) and tokens[-len(end) :] == list(end))
