"""Logits to tokens for a whole batch, each sequence by its own parameters and its own random stream.

Order: repeated tokens are penalised, bad words and end tokens that come too early are barred, then temperature, min-p,
top-k and top-p, as in vLLM. The stream is keyed by (seed, token index), so batching cannot change what is drawn.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from idefics2_engine.sequence import Sequence
from idefics2_kernels import Ops


class Sampler:
    """Chooses the next token of every sequence of a step."""

    def __init__(self, ops: Ops, bad_words_ids: Items[Items[int]], image_token_id: int) -> None:
        self.ops = ops
        self.bad_words_ids = [list(word) for word in bad_words_ids]
        self.image_token_id = image_token_id

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """Return one token for each row of ``logits`` (B, V)."""
        device, params = logits.device, [sequence.request.params for sequence in sequences]
        logits = logits.float().clone()
        for row, sequence in zip(logits, sequences, strict=True):
            self._penalise_repetition(row, sequence)
            self._bar(row, sequence)
        if all(p.temperature == 0 for p in params):
            return logits.argmax(-1).tolist()
        return self.ops.sample(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            torch.tensor([max(p.top_k, 0) for p in params], device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([sequence.seed for sequence in sequences], device=device),
            torch.tensor([sequence.num_generated for sequence in sequences], device=device),
        ).tolist()

    def _penalise_repetition(self, row: Tensor, sequence: Sequence) -> None:
        penalty = sequence.request.params.repetition_penalty
        if penalty == 1.0:
            return
        ids = sorted({*sequence.token_ids} - {self.image_token_id})
        seen = torch.tensor(ids, dtype=torch.int64, device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)

    def _bar(self, row: Tensor, sequence: Sequence) -> None:
        barred = [
            word[-1]
            for word in self.bad_words_ids
            if len(word) == 1 or sequence.token_ids[1 - len(word) :] == word[:-1]
        ]
        if sequence.num_generated < sequence.request.params.min_tokens:
            barred.extend(sequence.end_token_ids)
        # a config may name tokens that a smaller vocabulary does not have
        row[[token for token in barred if token < row.shape[0]]] = float("-inf")
