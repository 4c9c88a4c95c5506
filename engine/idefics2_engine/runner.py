"""One forward pass for a step: owns the model, the KV cache and the images' embeddings."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.images import ImageConfig, Tile
from idefics2_engine.kv_cache import KVCache
from idefics2_engine.model import Idefics2
from idefics2_engine.pages import NO_PAGE
from idefics2_engine.scheduler import Chunk, Step
from idefics2_engine.sequence import Request


class Runner:
    """Turns steps into the logits of next tokens."""

    def __init__(
        self, model: Idefics2, kv_cache: KVCache, image_config: ImageConfig, num_images: int
    ) -> None:
        self.model = model
        self.image_config = image_config
        self.kv_cache = kv_cache
        shape = (num_images, model.config.perceiver.num_latents, model.config.text.hidden_size)
        self.image_features = torch.empty(shape, device=model.device, dtype=model.dtype)

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[Tensor, list[tuple[Request, Tensor]]]:
        """Compute ``step``.

        Returns:
            Logits (B, vocabulary) for its chunks that sample, in their order; and for requests whose prompt is scored
            the logits (S, vocabulary) at the places that their chunks name.
        """
        if step.encodes:
            self._encode(step.encodes)
        if step.copies:
            self.kv_cache.copy(step.copies)
        batch = text_batch(step.chunks, self.kv_cache.page_size).to(self.model.device)
        rows = image_rows(step, self.image_features.shape[1])
        features = None
        if len(rows):
            features = self.image_features.flatten(0, 1)[
                torch.from_numpy(rows).to(self.model.device)
            ]
        logits: Tensor = self.model(batch, features, self.kv_cache.layers)
        scored = [len(chunk.scores) for chunk in step.chunks]
        if not any(scored):
            return logits, []
        ends = np.cumsum([count + c.samples for count, c in zip(scored, step.chunks, strict=True)])
        prompts, samples = [], []
        for chunk, count, end in zip(step.chunks, scored, ends.tolist(), strict=True):
            if count:
                first = end - chunk.samples - count
                prompts.append((chunk.sequence.request, logits[first : first + count]))
            if chunk.samples:
                samples.append(end - 1)
        return logits[torch.tensor(samples, dtype=torch.int64, device=logits.device)], prompts

    def _encode(self, encodes: list[tuple[Tile, int]]) -> None:
        tiles, slots = zip(*encodes, strict=True)
        batch = ImageBatch.from_tiles(tiles, self.image_config).to(self.model.device)
        places = torch.tensor(slots, device=self.model.device)
        self.image_features[places] = self.model.image_features(batch)


def text_batch(chunks: list[Chunk], page_size: int) -> TextBatch:
    """Pack the tokens of ``chunks``, with where they go in the cache."""
    lengths = [chunk.end - chunk.begin for chunk in chunks]
    positions = np.concatenate([np.arange(chunk.begin, chunk.end) for chunk in chunks])
    tables = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    owners = np.repeat(np.arange(len(chunks)), lengths)
    pages = tables[owners, positions // page_size].astype(np.int64)
    cu_seqlens = cumulative(lengths)
    wanted = [
        place - chunk.begin + offset
        for chunk, offset in zip(chunks, cu_seqlens.tolist(), strict=False)
        for place in (*chunk.scores, *([chunk.end - 1] if chunk.samples else []))
    ]
    tables[tables == NO_PAGE] = 0  # never read, but a page
    return TextBatch(
        input_ids=torch.tensor(
            [token for c in chunks for token in c.sequence.token_ids[c.begin : c.end]]
        ),
        positions=torch.from_numpy(positions),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        logits_indices=torch.tensor(wanted, dtype=torch.int64),
        paged=PagedView(
            slots=torch.from_numpy(pages * page_size + positions % page_size),
            block_table=torch.from_numpy(tables),
            context_lens=torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32),
        ),
    )


def image_rows(step: Step, num_latents: int) -> npt.NDArray[np.int64]:
    """Say which rows of all slots' embeddings the image tokens of ``step`` are, in order."""
    rows = [
        np.arange(max(item.begin, chunk.begin), min(item.end, chunk.end))
        + (slot * num_latents - item.begin)
        for chunk in step.chunks
        for item, slot in chunk.images
    ]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
