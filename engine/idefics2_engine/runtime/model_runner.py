"""The forward pass of a step on the device."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import to_device
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.model.batch import ImageBatch, Picture, cumulative
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.config import EngineConfig
from idefics2_engine.runtime.cuda_graphs import GraphPool
from idefics2_engine.runtime.image_graphs import ImageGraphs
from idefics2_engine.runtime.input_batch import (
    SAMPLED,
    PackedStep,
    pack,
    resolve_pending_tokens,
    text_batch,
)
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.runtime.pixel_upload import PixelUploader
from idefics2_engine.runtime.shared_prefix_tables import SharedPrefixTables
from idefics2_engine.runtime.step_gate import StepGate
from idefics2_engine.runtime.text_graphs import TextGraphs
from idefics2_engine.runtime.warm_up import warm_up_model
from idefics2_engine.scheduling.placeholders import Encodable
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.scheduling.step import Step


class Runner:
    """Computes the logits of steps without waiting for them.

    Args:
        model: The model.
        kv_cache: KV cache on the model's device.
        image_config: Normalization of pixels.
        config: Sizes of the runtime.
        gate: Opened while a launch waits for the device.
    """

    def __init__(
        self,
        model: Idefics2,
        kv_cache: KVCache,
        image_config: ImageConfig,
        config: EngineConfig,
        gate: StepGate,
    ) -> None:
        self.model = model
        self.image_config = image_config
        self.kv_cache = kv_cache
        latents, hidden = model.config.perceiver.num_latents, model.config.text.hidden_size
        has_image_graphs = config.cuda_graphs and config.prompt_graphs
        # The graphs write the embeddings of padding images to the last entry
        shape = (config.max_cached_images + has_image_graphs, latents, hidden)
        self.image_features = torch.empty(shape, device=model.device, dtype=model.dtype)
        self._last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int32, device=model.device)
        self._uploader = PixelUploader(model.device)
        if model.device.type == "cuda":
            warm_up_model(model, kv_cache)
        self._shared_prefixes: SharedPrefixTables | None = None
        if config.share_prefix_reads:
            self._shared_prefixes = SharedPrefixTables(model.config.text, config.page_size)
        self._text_graphs: TextGraphs | None = None
        self._image_graphs: ImageGraphs | None = None
        if config.cuda_graphs:
            pool = GraphPool(model.device)
            if has_image_graphs:
                self._image_graphs = ImageGraphs(
                    model,
                    image_config,
                    self.image_features,
                    config.max_patches,
                    self._uploader,
                    pool,
                    gate,
                )
            self._text_graphs = TextGraphs(
                model,
                kv_cache,
                self.image_features,
                self._last_tokens,
                -(-config.max_model_len // config.page_size),
                config.max_num_batched_tokens if config.prompt_graphs else 0,
                pool,
                self._shared_prefixes,
            )
            pool.finish()

    @property
    def num_padded_tokens(self) -> int:
        """Tokens of padding in all steps that were no decode steps."""
        return 0 if self._text_graphs is None else self._text_graphs.num_padded_tokens

    @property
    def num_padded_patches(self) -> int:
        """Patches of padding in all steps."""
        return 0 if self._image_graphs is None else self._image_graphs.num_padded_patches

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[Tensor, list[tuple[Request, Tensor]]]:
        """Compute ``step``.

        Returns:
            Logits (B, vocabulary) of the sequences that move on and of the chunks that sample, in
            order, valid until the next call. Then, for each request whose prompt is scored, the
            logits (S, vocabulary) at the scored positions.
        """
        if step.encodes:
            self.encode(step.encodes)
        if step.copies:
            self.kv_cache.copy(step.copies)
        packed = pack(step, self.kv_cache.page_size, self.image_features.shape[1])
        shared = self._shared_prefixes
        if packed.is_decode and shared is not None and shared.can_share(len(packed.context_lens)):
            packed = replace(packed, shared_prefixes=shared.find(packed))
        graphs = self._text_graphs
        if graphs is not None and graphs.can_run(packed):
            logits, hidden = graphs.run(packed), graphs.hidden
        else:
            logits, hidden = self._forward(packed)
        if not len(packed.scored):
            return logits, []
        (places,) = to_device([packed.scored], logits.device)
        scoring = [chunk for chunk in step.chunks if chunk.scores]
        parts = self.model.logits(hidden[places]).split([len(chunk.scores) for chunk in scoring])
        requests = [chunk.sequence.request for chunk in scoring]
        return logits, list(zip(requests, parts, strict=True))

    def store_last_tokens(self, token_ids: Tensor) -> None:
        """Store the tokens (B,) of a step for the next step."""
        self._last_tokens[: len(token_ids)] = token_ids

    def _forward(self, packed: PackedStep) -> tuple[Tensor, Tensor]:
        """Return the logits of the tokens that sample, and the hidden states of all tokens."""
        copies = to_device(packed.arrays(), self.model.device)
        input_ids, sampled = copies[0], copies[SAMPLED]
        if (packed.input_ids < 0).any():
            input_ids = resolve_pending_tokens(input_ids, self._last_tokens)
        batch = text_batch(copies, input_ids, packed)
        features = None if batch.feature_rows is None else self.image_features
        hidden = self.model.hidden_states(batch, features, self.kv_cache.layers)
        return self.model.logits(hidden[sampled]), hidden

    @torch.inference_mode()
    def encode(self, encodes: Sequence[tuple[Encodable, int]]) -> None:
        """Encode tiles, and pictures in patches, into their entries of ``image_features``."""
        tiles = [(one, entry) for one, entry in encodes if isinstance(one, Tile)]
        pictures = [(one, entry) for one, entry in encodes if isinstance(one, Picture)]
        if pictures:
            batch, entries = zip(*pictures, strict=True)
            self._store(self._encode_pictures(batch), entries)
        if tiles and self._image_graphs is not None:
            self._image_graphs.run(tiles)
        elif tiles:
            batch_of_tiles, entries = zip(*tiles, strict=True)
            pixels = self._uploader.upload(batch_of_tiles)
            images = ImageBatch.from_tiles(batch_of_tiles, self.image_config, pixels)
            self._store(self.model.image_features(images.to(self.model.device)), entries)

    def _encode_pictures(self, pictures: Sequence[Picture]) -> Tensor:
        counts = [picture.num_patches for picture in pictures]
        return self.model.encode(
            torch.cat([picture.patches for picture in pictures]),
            torch.cat([picture.position_ids for picture in pictures]),
            cumulative(counts).to(self.model.device),
            max(counts),
        )

    def _store(self, features: Tensor, entries: Sequence[int]) -> None:
        (places,) = to_device([np.array(entries, np.int64)], self.model.device)
        self.image_features[places] = features
