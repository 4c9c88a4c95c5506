"""The forward pass of a step on the device."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import to_device
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.model.batch import ImageBatch
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.cuda_graphs import DecodeGraphs
from idefics2_engine.runtime.input_batch import PackedStep, pack, resolve_pending_tokens, text_batch
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.scheduling.scheduler import Step
from idefics2_engine.scheduling.sequence import Request, Sequence


class Runner:
    """Computes the logits of steps without waiting for the device.

    Args:
        model: The model.
        kv_cache: KV cache on the model's device.
        image_config: Normalization of pixels.
        num_images: Entries of the encoder cache, each with the embeddings of a tile.
        max_num_seqs: Most sequences that draw a token in a step.
        max_pages: Most pages of a sequence, for CUDA graphs of decode steps. None for no graphs.
    """

    def __init__(
        self,
        model: Idefics2,
        kv_cache: KVCache,
        image_config: ImageConfig,
        num_images: int,
        max_num_seqs: int,
        max_pages: int | None,
    ) -> None:
        self.model = model
        self.image_config = image_config
        self.kv_cache = kv_cache
        shape = (num_images, model.config.perceiver.num_latents, model.config.text.hidden_size)
        self.image_features = torch.empty(shape, device=model.device, dtype=model.dtype)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=model.device)
        self._graphs = None
        if max_pages is not None:
            self._graphs = DecodeGraphs(model, kv_cache, self._last_tokens, max_pages)

    @torch.inference_mode()
    def run(
        self, step: Step, drawn: Mapping[Sequence, int]
    ) -> tuple[Tensor, list[tuple[Request, Tensor]]]:
        """Compute ``step``.

        Args:
            step: The step.
            drawn: Rows of the previous step's tokens that the host has not read yet.

        Returns:
            Logits (B, vocabulary) of the chunks that sample, in order, valid until the next call.
            Then, for each request whose prompt is scored, the logits (S, vocabulary) at the scored
            positions.
        """
        if step.encodes:
            self._encode(step.encodes)
        if step.copies:
            self.kv_cache.copy(step.copies)
        packed = pack(step, drawn, self.kv_cache.page_size, self.image_features.shape[1])
        if self._graphs is not None and self._graphs.can_run(packed):
            return self._graphs.run(packed), []
        logits = self._forward(packed)
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
        (rows,) = to_device([np.array(samples, np.int64)], logits.device)
        return logits[rows], prompts

    def store_last_tokens(self, token_ids: Tensor) -> None:
        """Store the tokens (B,) of a step for the next step."""
        self._last_tokens[: len(token_ids)] = token_ids

    def _forward(self, packed: PackedStep) -> Tensor:
        copies = to_device(packed.arrays(), self.model.device)
        input_ids, image_rows = copies[0], copies[-1]
        if (packed.input_ids < 0).any():
            input_ids = resolve_pending_tokens(input_ids, self._last_tokens)
        features = None
        if len(image_rows):
            features = self.image_features.flatten(0, 1)[image_rows]
        batch = text_batch(copies, input_ids, packed)
        logits: Tensor = self.model(batch, features, self.kv_cache.layers)
        return logits

    def _encode(self, encodes: list[tuple[Tile, int]]) -> None:
        tiles, entries = zip(*encodes, strict=True)
        device = self.model.device
        images = ImageBatch.from_tiles(tiles, self.image_config).to(device)
        (places,) = to_device([np.array(entries, np.int64)], device)
        self.image_features[places] = self.model.image_features(images)
