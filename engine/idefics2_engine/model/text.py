"""The Mistral decoder over packed sequences, with or without a paged KV cache."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from idefics2_engine.model.batch import TextBatch
from idefics2_engine.model.config import TextConfig
from idefics2_engine.model.layers import GatedMLP, RMSNorm
from idefics2_engine.model.linear import Linear
from idefics2_kernels import Ops

LayerCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, (pages, H_KV, page size, D) each."""


class TextAttention(nn.Module):
    """Causal attention with grouped heads, rotary positions and a sliding window."""

    def __init__(self, config: TextConfig, ops: Ops) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        width = config.num_heads * config.head_dim
        self.qkv_proj = Linear(
            config.hidden_size, sum(self.heads) * config.head_dim, ops, bias=False
        )
        self.o_proj = Linear(width, config.hidden_size, ops, bias=False)
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.ops = ops

    def forward(
        self, x: Tensor, batch: TextBatch, cos_sin: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """Map ``x`` (T, hidden) to (T, hidden), through ``cache`` if the batch has a paged view."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        if batch.paged is None or cache is None:
            q, k = self.ops.rotary(q, k, batch.positions, cos_sin)
            out = self.ops.flash_attention(
                q, k, v, batch.cu_seqlens, batch.max_seqlen, causal=True, window=self.window
            )
        else:
            paged = batch.paged
            q = self.ops.rotary_and_cache(q, k, v, batch.positions, cos_sin, *cache, paged.slots)
            out = self.ops.paged_attention(
                q,
                *cache,
                paged.block_table,
                paged.context_lens,
                batch.cu_seqlens,
                batch.max_seqlen,
                window=self.window,
                shared_prefixes=paged.shared_prefixes,
            )
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected


class TextLayer(nn.Module):
    """Pre-norm block; its last branch is added to the residual by the norm that follows."""

    def __init__(self, config: TextConfig, ops: Ops) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden, eps, ops)
        self.attention = TextAttention(config, ops)
        self.mlp_norm = RMSNorm(hidden, eps, ops)
        self.mlp = GatedMLP(hidden, config.intermediate_size, hidden, ops)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        batch: TextBatch,
        cos_sin: Tensor,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Map ``x`` (T, hidden), the norm of ``residual``, to a branch and its residual."""
        x, residual = self.mlp_norm.add(self.attention(x, batch, cos_sin, cache), residual)
        return self.mlp(x), residual


class TextModel(nn.Module):
    """The decoder from token embeddings to normalized hidden states."""

    def __init__(self, config: TextConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(TextLayer(config, ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self._cos_sin: Tensor | None = None

    def forward(
        self, embeds: Tensor, batch: TextBatch, kv_cache: list[LayerCache] | None = None
    ) -> Tensor:
        """Map ``embeds`` (T, hidden) to hidden states (T, hidden)."""
        if (batch.paged is None) != (kv_cache is None):
            raise ValueError(
                "a batch with a paged view needs kv_cache, and one without must have none"
            )
        cos_sin = self.cos_sin(embeds.device)
        layers = cast(Sequence[TextLayer], self.layers)
        next_norms = [*(layer.attention_norm for layer in layers[1:]), self.norm]
        x: Tensor = layers[0].attention_norm(embeds)
        residual = embeds
        for i, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            cache = None if kv_cache is None else kv_cache[i]
            branch, residual = layer(x, residual, batch, cos_sin, cache)
            x, residual = next_norm.add(branch, residual)
        return x

    def cos_sin(self, device: torch.device) -> Tensor:
        """Return the rotary table (positions, D), fp32: D/2 cosines, then D/2 sines."""
        if self._cos_sin is None or self._cos_sin.device != device:
            self._cos_sin = rotary_table(self.config).to(device)
        return self._cos_sin


def rotary_table(config: TextConfig) -> Tensor:
    """Build the rotary table (positions, D) in fp32 on the CPU, as in training."""
    D = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (
        torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D
    )
    positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
