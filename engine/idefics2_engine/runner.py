"""One forward pass for the sequences of a step: owns the model and the KV cache."""

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.images import ImageConfig, Tile
from idefics2_engine.kv_cache import KVCache
from idefics2_engine.model import Idefics2
from idefics2_engine.sequence import Request, Sequence

_TILES_PER_PASS = 16  # bounds the vision tower's memory


class Runner:
    """Turns sequences into the logits of their next tokens."""

    def __init__(self, model: Idefics2, kv_cache: KVCache, image_config: ImageConfig) -> None:
        self.model = model
        self.image_config = image_config
        self.kv_cache = kv_cache

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> tuple[Tensor, list[tuple[Request, Tensor]]]:
        """Compute what ``sequences`` (B) have not computed yet.

        Returns:
            Logits (B, vocabulary) at their last tokens; and for each request that waits for its prompt's log
            probabilities the logits (T - 1, vocabulary) at all tokens of the prompt but the last.
        """
        tiles = [
            tile
            for sequence in sequences
            if sequence.num_computed == 0
            for tile in sequence.request.tiles
        ]
        features = self._encode(tiles) if tiles else None
        batch = text_batch(sequences, self.kv_cache.page_size).to(self.model.device)
        logits: Tensor = self.model(batch, features, self.kv_cache.layers)
        ends = np.cumsum([_num_logits(sequence) for sequence in sequences])
        prompts = [
            (sequence.request, logits[end - _num_logits(sequence) : end - 1])
            for sequence, end in zip(sequences, ends, strict=True)
            if sequence.scores_prompt
        ]
        for sequence in sequences:
            sequence.num_computed = len(sequence.token_ids)
        if prompts:
            logits = logits[torch.from_numpy(ends - 1).to(logits.device)]
        return logits, prompts

    def _encode(self, tiles: list[Tile]) -> Tensor:
        passes = [tiles[i : i + _TILES_PER_PASS] for i in range(0, len(tiles), _TILES_PER_PASS)]
        batches = [ImageBatch.from_tiles(some, self.image_config) for some in passes]
        return torch.cat(
            [self.model.image_features(batch.to(self.model.device)) for batch in batches]
        )


def _num_logits(sequence: Sequence) -> int:
    """Count the last tokens of ``sequence`` that give logits in its next pass."""
    return len(sequence.token_ids) - sequence.num_computed if sequence.scores_prompt else 1


def text_batch(sequences: list[Sequence], page_size: int) -> TextBatch:
    """Pack the tokens that ``sequences`` have not computed yet, with where they go in the cache."""
    spans = [range(s.num_computed, len(s.token_ids)) for s in sequences]
    tokens = [(s, position) for s, span in zip(sequences, spans, strict=True) for position in span]
    widest = max(len(s.pages) for s in sequences)
    cu_seqlens = cumulative([len(span) for span in spans])
    return TextBatch(
        input_ids=torch.tensor([s.token_ids[position] for s, position in tokens]),
        positions=torch.tensor([position for _, position in tokens]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(len(span) for span in spans),
        logits_indices=torch.cat(
            [
                torch.arange(end - _num_logits(sequence), end)
                for sequence, end in zip(sequences, cu_seqlens[1:].tolist(), strict=True)
            ]
        ),
        paged=PagedView(
            slots=torch.tensor(
                [s.pages[p // page_size] * page_size + p % page_size for s, p in tokens]
            ),
            block_table=torch.tensor(
                [s.pages + [0] * (widest - len(s.pages)) for s in sequences], dtype=torch.int32
            ),
            context_lens=torch.tensor([len(s.token_ids) for s in sequences], dtype=torch.int32),
        ),
    )
