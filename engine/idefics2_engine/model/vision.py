"""The SigLIP vision tower over packed patches of images of any sizes, without padding."""

import torch
from torch import Tensor, nn

from idefics2_engine.model.config import VisionConfig
from idefics2_engine.model.layers import LayerNorm
from idefics2_engine.model.linear import Linear
from idefics2_kernels import Ops


class VisionAttention(nn.Module):
    """Bidirectional attention within each image."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size, ops, bias=True)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, ops, bias=True)
        self.num_heads = config.num_heads
        self.ops = ops

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Map ``x`` (P, hidden) to (P, hidden); ``cu_seqlens`` (N + 1,) bounds the images."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out = self.ops.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=False)
        projected: Tensor = self.out_proj(out.flatten(1))
        return projected


class VisionMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, ops, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, ops, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (P, hidden) to (P, hidden)."""
        out: Tensor = self.fc2(self.fc1.gelu(x))
        return out


class VisionLayer(nn.Module):
    """Pre-norm block; its last branch is added to the residual by the norm that follows."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.attention = VisionAttention(config, ops)
        self.mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.mlp = VisionMLP(config, ops)

    def forward(
        self, branch: Tensor, residual: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Map a branch and its ``residual`` (P, hidden), not yet added, to the next pair."""
        x, residual = self.attention_norm.add(branch, residual)
        x, residual = self.mlp_norm.add(self.attention(x, cu_seqlens, max_seqlen), residual)
        return self.mlp(x), residual


class VisionTower(nn.Module):
    """The encoder of patches, with learned position embeddings."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size, ops, bias=True)
        self.position_embedding = nn.Parameter(torch.empty(config.grid**2, config.hidden_size))
        self.layers = nn.ModuleList(VisionLayer(config, ops) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)

    def forward(
        self, patches: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Map ``patches`` (P, patch_dim) at ``position_ids`` (P,) to features (P, hidden)."""
        branch = self.patch_embedding(patches)
        # The backward of plain indexing would add equal positions sequentially
        residual = nn.functional.embedding(position_ids, self.position_embedding)
        for layer in self.layers:
            branch, residual = layer(branch, residual, cu_seqlens, max_seqlen)
        return self.norm.add(branch, residual)[0]
