"""The vision tower and the connector of transformers with this package's operations.

As in ``blocks``, each class has the name of the class that it extends. The tower and the projection
compute no padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.idefics2 import modeling_idefics2

from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.hooks import record_as
from idefics2_engine.hf.operations import needs_gradients, operations_of
from idefics2_engine.hf.packed_rows import PackedRows
from idefics2_engine.hf.rules import TRANSFORMERS, Rules, patch_positions
from idefics2_engine.hf.training.kept_attention import CheckpointedLayer

# Patches of four images of 980 x 980. The inner rows of the projection are 12 times as wide as its
# inputs, so a step of training computes them in chunks, which checkpoints do not keep
TRAINED_ROWS = 4 * 70 * 70


def _checkpoint(module: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``function``, and compute it again in the backward pass if ``module`` is to do so.

    Reentrant checkpoints have no gradients where no input needs one, as behind a frozen tower.
    """
    if module.gradient_checkpointing and module.training and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return function(*args, **kwargs)


class LayerNorm(nn.LayerNorm):
    """The layer norm of the vision tower."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` (..., hidden)."""
        ops = operations_of(self).for_call(input, self.weight, self.bias)
        if ops is None:
            return super().forward(input)
        return ops.layer_norm(input.contiguous(), self.weight, self.bias, self.eps)


class Idefics2VisionMLP(modeling_idefics2.Idefics2VisionMLP):
    """The MLP of the vision tower."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``hidden_states`` (..., hidden) to (..., hidden)."""
        inner = self.fc1(hidden_states)
        ops = operations_of(self).for_call(inner)
        inner = self.activation_fn(inner) if ops is None else ops.gelu_tanh(inner)
        out: Tensor = self.fc2(inner)
        return out


class Idefics2VisionEmbeddings(modeling_idefics2.Idefics2VisionEmbeddings):
    """The embeddings of patches, at the positions of ``rules``."""

    rules: Rules = TRANSFORMERS

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        """Embed pixels (N, 3, H, W), of which a mask (N, R, C) of patches is kept, (N, R * C, hidden)."""
        if self.rules == TRANSFORMERS:
            transformers_own: Any = super().forward
            out: Tensor = transformers_own(pixel_values, patch_attention_mask)
            return out
        ids = patch_positions(self, patch_attention_mask.bool(), pixel_values.dtype)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        out = patches + self.position_embedding(ids)
        return out


class Idefics2VisionTransformer(  # type: ignore[no-untyped-call]
    modeling_idefics2.Idefics2VisionTransformer
):
    """The vision tower, which has no history while it is frozen."""

    def forward(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Encode pixels (N, 3, H, W), of which a mask (N, R, C) of patches is kept."""
        transformers_own: Any = super().forward
        if torch.compiler.is_compiling() or needs_gradients(pixel_values, module=self):
            return transformers_own(pixel_values, patch_attention_mask, **kwargs)
        # For its checkpoints transformers lets embeddings need gradients, those of patches as well
        with torch.no_grad():
            return transformers_own(pixel_values, patch_attention_mask, **kwargs)


record_as(Idefics2VisionTransformer, modeling_idefics2.Idefics2VisionTransformer)


class Idefics2EncoderLayer(  # type: ignore[no-untyped-call]
    CheckpointedLayer, modeling_idefics2.Idefics2EncoderLayer
):
    """A layer of the vision tower, whose checkpoints keep its attention."""


class Idefics2Encoder(modeling_idefics2.Idefics2Encoder):
    """The layers of the vision tower, which compute no padding."""

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Encode ``inputs_embeds`` (N, P, hidden), of which ``attention_mask`` (N, P) is kept.

        Padding of the result is zero.
        """
        # The convolution's output is transposed in memory. Every sum with it would be too, and slow
        inputs_embeds = inputs_embeds.contiguous()
        config = self.config
        wants_states = kwargs.get("output_hidden_states", config.output_hidden_states)
        if (
            attention_mask is None
            or attention_mask.ndim != 2
            or config._attn_implementation != NAME
            # Hooks would record the states of packed rows
            or wants_states
            # Dropout is transformers', on padded rows
            or (self.training and config.attention_dropout)
            or operations_of(self).for_call(inputs_embeds, module=self) is None
        ):
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        rows = PackedRows.from_mask(attention_mask)
        out: Any = super().forward(rows.pack(inputs_embeds)[None], rows, **kwargs)
        out.last_hidden_state = rows.unpack(out.last_hidden_state[0])
        return out


class Idefics2PerceiverLayer(modeling_idefics2.Idefics2PerceiverLayer):
    """A layer of the perceiver, which is checkpointed as those of the other parts are."""

    # transformers sets it on all modules that have it
    gradient_checkpointing = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map latents and features to latents, as transformers' ``forward``."""
        transformers_own: Any = super().forward
        out: Tensor = _checkpoint(self, transformers_own, *args, **kwargs)
        return out


class Idefics2Connector(modeling_idefics2.Idefics2Connector):
    """The projection, which computes no padding, and the perceiver."""

    gradient_checkpointing = False

    def forward(self, image_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Map features (N, P, vision hidden), of which a mask (N, P) is kept, to (N, L, hidden)."""
        transformers_own: Any = super().forward
        out: Tensor
        if operations_of(self).for_call(image_hidden_states, module=self) is None:
            out = transformers_own(image_hidden_states, attention_mask)
            return out
        rows = PackedRows.from_mask(attention_mask)
        packed = rows.pack(image_hidden_states)
        if needs_gradients(packed, module=self):
            # Chunks with checkpoints and without, so that both have the same bits
            chunks = [
                _checkpoint(self, self.modality_projection, chunk)
                for chunk in packed.split(TRAINED_ROWS)
            ]
            projected = torch.cat(chunks)
        else:
            projected = self.modality_projection(packed)
        features = rows.unpack(projected)
        out = self.perceiver_resampler(context=features, attention_mask=attention_mask)
        return out
