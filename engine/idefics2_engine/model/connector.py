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
        self, latents: Tensor, context: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Update ``latents`` (N, L, hidden) from ``context`` (P, hidden) by ``cu_seqlens``."""
        q = self.q_proj(latents).unflatten(-1, (-1, self.head_dim))
        k_latents, v_latents = self._keys_and_values(latents)
        k_context, v_context = self._keys_and_values(context)
        out = self.ops.perceiver_attention(
            q, k_context, v_context, k_latents, v_latents, cu_seqlens, max_seqlen
        )
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv_proj(x).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
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

    def forward(
        self, x: Tensor, residual: Tensor, context: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Map ``x`` (N, L, hidden), the norm of ``residual``, to a branch and its residual."""
        x = self.attention(x, self.context_norm(context), cu_seqlens, max_seqlen)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Perceiver(nn.Module):
    """A fixed number of latents that attend to any number of patches."""

    def __init__(self, config: PerceiverConfig, ops: Ops) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.layers = nn.ModuleList(PerceiverLayer(config, ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(self, context: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Resample ``context`` (P, hidden) of N images to (N, L, hidden)."""
        residual = self.latents.expand(cu_seqlens.shape[0] - 1, -1, -1)
        layers = cast(Sequence[PerceiverLayer], self.layers)
        next_norms = [*(layer.latents_norm for layer in layers[1:]), self.norm]
        x: Tensor = layers[0].latents_norm(residual)
        for layer, next_norm in zip(layers, next_norms, strict=True):
            branch, residual = layer(x, residual, context, cu_seqlens, max_seqlen)
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

    def forward(self, features: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Map ``features`` (P, vision hidden) of N images to (N, latents, text hidden)."""
        out: Tensor = self.perceiver(self.projection(features), cu_seqlens, max_seqlen)
        return out
