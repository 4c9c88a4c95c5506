"""The operations of training in PyTorch's fused forms.

They compute the same as ``REFERENCE`` with fewer passes over memory, for sequences of equal length.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from idefics2_kernels import REFERENCE


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _gelu_tanh(functional.linear(x, weight, bias))


def _rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (t[:, None] for t in cos_sin[positions].to(q.dtype).chunk(2, dim=-1))
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    rotated = (x * cos + x.roll(x.shape[-1] // 2, -1) * sin for x in (q, k))
    return next(rotated), next(rotated)


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    if lse is not None:
        raise ValueError("lse must be None: autograd records this attention")
    S = max_seqlen
    if (cu_seqlens.shape[0] - 1) * S != q.shape[0]:
        raise ValueError(f"sequences must be of equal length {S}, got {q.shape[0]} tokens in all")
    mask = None
    if window is not None and window < S:
        distance = torch.arange(S, device=q.device)[:, None] - torch.arange(S, device=q.device)
        mask = (distance.abs() < window) & (distance >= 0 if causal else True)
    q, k, v = (t.unflatten(0, (-1, S)).transpose(1, 2) for t in (q, k, v))
    # The fused form with a mask has no grouped heads
    if mask is not None:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(0, 1)


def _perceiver_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Tensor:
    k, v = (
        torch.cat([context.unflatten(0, (-1, max_seqlen)), latents], 1).transpose(1, 2)
        for context, latents in ((k_context, k_latents), (v_context, v_latents))
    )
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


TRAINING = replace(
    REFERENCE,
    layer_norm=_layer_norm,
    add_layer_norm=_add_layer_norm,
    rms_norm=_rms_norm,
    add_rms_norm=_add_rms_norm,
    silu_mul=_silu_mul,
    gelu_tanh=_gelu_tanh,
    linear_gelu=_linear_gelu,
    rotary=_rotary,
    flash_attention=_flash_attention,
    perceiver_attention=_perceiver_attention,
)
