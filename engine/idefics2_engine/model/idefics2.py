"""The whole network: vision tower, connector, text model and head."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.connector import Connector
from idefics2_engine.model.linear import NF4Linear, SideBySide
from idefics2_engine.model.text import LayerCache, TextModel
from idefics2_engine.model.vision import VisionTower
from idefics2_kernels import REFERENCE, NF4Weight, Ops

IGNORED_LABEL = -100


class Idefics2(nn.Module):
    """Idefics2 over packed tiles and packed tokens.

    Parameters are allocated on ``device`` in ``dtype`` but not initialized. Load a checkpoint or
    call ``init_weights``. On the device ``"meta"``, ``allocate`` gives them memory, and layers can
    be replaced before that at no cost.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops = REFERENCE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        with torch.device(device), _default_dtype(dtype):
            self.vision = VisionTower(config.vision, ops)
            self.connector = Connector(config, ops)
            self.text = TextModel(config.text, ops)
            if config.tie_word_embeddings:
                self.lm_head = self.text.embedding
            else:
                self.lm_head = nn.Parameter(torch.empty_like(self.text.embedding))

    def allocate(self, device: torch.device | str) -> None:
        """Allocate uninitialized memory for the parameters on ``device``."""
        self.to_empty(device=device)
        if self.config.tie_word_embeddings:
            # to_empty has made two parameters of the tied one
            self.lm_head = self.text.embedding

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.lm_head.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of all computations."""
        return self.lm_head.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, dense or in NF4."""
        parts = [
            part
            for m in self.modules()
            if isinstance(m, NF4Linear)
            for part in m.weight.tensors.values()
        ]
        return sum(tensor.nbytes for tensor in (*self.parameters(), *parts))

    def with_ops(self, ops: Ops) -> "Idefics2":
        """Return a model that computes with ``ops`` and shares this one's weights."""
        values = [value for module in self.modules() for value in vars(module).values()]
        weights = [value for value in values if isinstance(value, Tensor | NF4Weight)]
        shared = [*self.parameters(), *weights]
        # What is in the memo is not copied
        twin = copy.deepcopy(self, {id(value): value for value in shared})
        for module in twin.modules():
            if hasattr(module, "ops"):
                module.ops = ops  # type: ignore[assignment]
        return twin

    def set_nf4(self, name: str, weight: NF4Weight) -> None:
        """Set the weight of the NF4 layer called ``name``.

        Once all layers of a ``SideBySide`` group are set, their weights are stacked.
        """
        layer = self.get_submodule(name)
        assert isinstance(layer, NF4Linear)
        layer.weight = weight
        group = self.get_submodule(name.rpartition(".layers.")[0])
        if isinstance(group, SideBySide):
            group.stack()

    def image_features(self, images: ImageBatch) -> Tensor:
        """Encode N tiles to embeddings (N, latents, hidden) of the text model."""
        patches = self.ops.patches(
            images.pixels,
            images.cu_seqlens,
            images.widths,
            self.config.vision.patch_size,
            images.rescale_factor,
            images.mean,
            images.std,
            self.dtype,
        )
        return self.encode(patches, images.position_ids, images.cu_seqlens, images.max_seqlen)

    def encode(
        self, patches: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Encode normalized ``patches`` (P, patch_dim) of N tiles to (N, latents, hidden)."""
        features = self.vision(patches, position_ids, cu_seqlens, max_seqlen)
        encoded: Tensor = self.connector(features, cu_seqlens, max_seqlen)
        return encoded

    def forward(
        self,
        batch: TextBatch,
        image_features: Tensor | None = None,
        kv_cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Return logits (rows, vocabulary) for ``batch.logits_indices``, or for every token.

        ``image_features`` (..., hidden) replace the embeddings of the batch's image tokens, in
        order, and must have as many rows. Without features, image tokens keep their embedding.

        Raises:
            ValueError: A sequence is longer than the model's positions, or, on a CPU, the numbers
                of features and image tokens differ. On a GPU that difference is a device-side
                assertion, like an invalid token id. With a KV cache there are no checks, because
                the engine has checked the requests.
        """
        hidden = self.hidden_states(batch, image_features, kv_cache)
        if batch.logits_indices is not None:
            hidden = hidden[batch.logits_indices]
        return self.logits(hidden)

    def hidden_states(
        self,
        batch: TextBatch,
        image_features: Tensor | None = None,
        kv_cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Return the normalized hidden states (T, hidden) of every token of ``batch``.

        Raises as ``forward``.
        """
        if batch.paged is None:
            self._check(batch, image_features)
        embeds = self.embed(batch.input_ids, image_features, batch.feature_rows)
        hidden: Tensor = self.text(embeds, batch, kv_cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (rows, hidden) to logits (rows, vocabulary)."""
        logits = self.ops.linear(hidden, self.lm_head)
        return logits[:, : self.config.text.vocab_size]

    def embed(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> Tensor:
        """Embed ``input_ids`` (T,), with ``image_features`` at the image tokens: (T, hidden).

        ``feature_rows`` (T,) is the row of ``image_features`` (..., hidden) for each token, or -1
        for a token with an embedding of its own. If ``None``, the image tokens take the features in
        order.
        """
        # The padding rows are cut off, so that ids beyond the vocabulary are errors
        tokens = self.text.embedding[: self.config.text.vocab_size]
        embeds = nn.functional.embedding(input_ids, tokens)
        if image_features is None:
            return embeds
        if feature_rows is None:
            is_image = input_ids == self.config.image_token_id
            # Each image token looks up its row, as masked_scatter's backward would wait for the
            # device
            feature_rows = torch.where(is_image, is_image.cumsum(0) - 1, -1)
        features = image_features.flatten(0, -2).to(embeds.dtype)
        looked_up = nn.functional.embedding(feature_rows.clamp(min=0), features)
        return torch.where(feature_rows[:, None] >= 0, looked_up, embeds)

    def _check(self, batch: TextBatch, image_features: Tensor | None) -> None:
        positions = self.config.text.max_positions
        if batch.max_seqlen > positions:
            raise ValueError(
                f"sequences must have at most {positions} tokens, got one of {batch.max_seqlen}"
            )
        if image_features is None:
            return
        image_tokens = (batch.input_ids == self.config.image_token_id).sum()
        rows = image_features.shape[:-1].numel()
        wanted = f"image tokens must be as many as rows of image_features {rows}"
        if image_tokens.device.type == "cpu":
            if int(image_tokens) != rows:
                raise ValueError(f"{wanted}, got {int(image_tokens)}")
        else:
            torch._assert_async(image_tokens == rows, wanted)

    def loss(
        self, batch: TextBatch, labels: Tensor, image_features: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross entropy of each token's successor, in fp32 or wider.

        ``labels`` (T,) are aligned with the tokens. The label -100 is ignored; the caller sets it
        for image and padding tokens.
        """
        return next_token_loss(self(batch, image_features), labels, batch)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02, *, double_quant: bool = True) -> None:
        """Draw random weights: N(0, ``std``) for matrices, N(0, 1) for latents.

        Norms are one and biases zero. Latents differ, because equal latents would stay equal in
        training. Weights in NF4 are drawn in the model's dtype and quantized one at a time, with or
        without ``double_quant``.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("latents"):
                parameter.normal_(generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=std, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, NF4Linear):
                drawn = torch.empty(module.shape, device=self.device, dtype=self.dtype)
                drawn.normal_(std=std, generator=generator)
                self.set_nf4(name, self.ops.nf4_quantize(drawn, double_quant=double_quant))
        for table in (self.text.embedding, self.lm_head):
            table[self.config.text.vocab_size :] = 0.0


def next_token_loss(logits: Tensor, labels: Tensor, batch: TextBatch) -> Tensor:
    """Return the mean cross entropy of ``logits`` (T, V) for the successors in ``labels`` (T,)."""
    if batch.logits_indices is not None:
        raise ValueError("the loss needs logits for every token, got a batch with logits_indices")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be ({len(logits)},), one a token, got {tuple(labels.shape)}")
    targets = labels.roll(-1).index_fill(0, batch.cu_seqlens[1:].long() - 1, IGNORED_LABEL)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED_LABEL)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
