"""The connector: a gated projection of patch features, then a perceiver."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from idefics2_engine.model.config import ModelConfig, PerceiverConfig
from idefics2_engine.model.layers import GatedMLP, RMSNorm
from idefics2_engine.model.linear import Linear
from idefics2_kernels import Ops


class PerceiverAttention(nn.Module):
    """Attention of latents to their image's patches and to the latents.

    The keys of patches and latents are separate tensors, which are not concatenated.
    """

    def __init__(self, config: PerceiverConfig, ops: Ops) -> None:
        super().__init__()
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = Linear(config.hidden_size, width, ops, bias=False)
        self.kv_proj = Linear(config.hidden_size, 2 * kv_width, ops, bias=False)
        self.o_proj = Linear(width, config.hidden_size, ops, bias=False)
        self.head_dim = config.head_dim
        self.ops = ops

    def forward(
        self, latents: Tensor, keys_values: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Update ``latents`` (N, L, hidden) from patches by ``cu_seqlens``.

        ``keys_values`` (P, 2 * H_KV * D) is ``kv_proj`` of the normalized patches.
        """
        q = self.q_proj(latents).unflatten(-1, (-1, self.head_dim))
        k_latents, v_latents = self._split(self.kv_proj(latents))
        k_context, v_context = self._split(keys_values)
        out = self.ops.perceiver_attention(
            q, k_context, v_context, k_latents, v_latents, cu_seqlens, max_seqlen
        )
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

    def _split(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        k, v = keys_values.unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return k, v


class PerceiverLayer(nn.Module):
    """Pre-norm block; its last branch is added to the residual by the norm that follows."""

    def __init__(self, config: PerceiverConfig, ops: Ops) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.latents_norm = RMSNorm(hidden, eps, ops)
        self.context_norm = RMSNorm(hidden, eps, ops)
        self.attention = PerceiverAttention(config, ops)
        self.mlp_norm = RMSNorm(hidden, eps, ops)
        self.mlp = GatedMLP(hidden, config.intermediate_size, hidden, ops)

    def keys_values(self, context: Tensor) -> Tensor:
        """Map ``context`` (P, hidden) to the keys and values that latents attend to."""
        projected: Tensor = self.attention.kv_proj(self.context_norm(context))
        return projected

    def forward(
        self, x: Tensor, residual: Tensor, keys_values: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Map ``x`` (N, L, hidden), the norm of ``residual``, to a branch and its residual."""
        x = self.attention(x, keys_values, cu_seqlens, max_seqlen)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Perceiver(nn.Module):
    """A fixed number of latents that attend to any number of patches."""

    def __init__(self, config: PerceiverConfig, ops: Ops) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.layers = nn.ModuleList(PerceiverLayer(config, ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def keys_values(self, context: Tensor) -> list[Tensor]:
        """Map ``context`` (P, hidden) to the keys and values of each layer, (P, 2 * H_KV * D).

        They do not depend on the latents.
        """
        layers = cast(Sequence[PerceiverLayer], self.layers)
        return [layer.keys_values(context) for layer in layers]

    def forward(self, keys_values: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Resample the patches of N images to (N, L, hidden), from their ``keys_values``."""
        residual = self.latents.expand(cu_seqlens.shape[0] - 1, -1, -1)
        layers = cast(Sequence[PerceiverLayer], self.layers)
        next_norms = [*(layer.latents_norm for layer in layers[1:]), self.norm]
        x: Tensor = layers[0].latents_norm(residual)
        for layer, next_norm, own in zip(layers, next_norms, keys_values, strict=True):
            branch, residual = layer(x, residual, own, cu_seqlens, max_seqlen)
            x, residual = next_norm.add(branch, residual)
        return x


class Connector(nn.Module):
    """The map from features of the vision tower to embeddings of the text model."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        hidden = config.text.hidden_size
        self.projection = GatedMLP(
            config.vision.hidden_size, config.text.intermediate_size, hidden, ops
        )
        self.perceiver = Perceiver(config.perceiver, ops)

    def keys_values(self, features: Tensor) -> list[Tensor]:
        """Map ``features`` (P, vision hidden) to the keys and values of the perceiver's layers."""
        return self.perceiver.keys_values(self.projection(features))

    def forward(self, features: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Map ``features`` (P, vision hidden) of N images to (N, latents, text hidden)."""
        out: Tensor = self.perceiver(self.keys_values(features), cu_seqlens, max_seqlen)
        return out
