"""Products and attentions of the reference whose rows do not depend on each other, bit for bit.

A library chooses the order of a product's sums by its shape. So the last bits of a row of a batch
depend on the number of rows. Here each row is a product of its own: a vector by a matrix. A query
is multiplied by exactly the keys that it sees, so masked keys do not count either. This is many
times slower than the reference.
"""

from itertools import pairwise

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference.nf4 import nf4_dequantize
from idefics2_kernels.reference.operations import gelu_tanh
from idefics2_kernels.reference.precision import widen


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x`` (..., K) times ``weight`` (N, K) plus ``bias``: (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for index in range(rows.shape[0]):
        # A copy is aligned in the same way in every batch
        out[index] = torch.nn.functional.linear(rows[index].clone(), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh form of GELU of ``linear``."""
    return gelu_tanh(linear(x, weight, bias))


def nf4_matmul(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Return ``x`` (..., K) times the NF4 weight (N, K) plus ``bias``: (..., N)."""
    return linear(x, nf4_dequantize(weight).to(x.dtype), bias)


def lora_linear(
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``x`` (..., K) times ``base`` (N, K), plus ``scale`` times x @ a.T @ b.T: (..., N)."""
    out = nf4_matmul(x, base, bias) if isinstance(base, NF4Weight) else linear(x, base, bias)
    update = linear(widen(linear(x, a)), widen(b))
    return (widen(out) + update * scale).to(x.dtype)


def flash_attention(
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
    """Attend within packed sequences, as the reference does."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        for row in range(begin, end):
            first = begin if window is None else max(begin, row - window + 1)
            last = row + 1 if causal else end
            if window is not None:
                last = min(last, row + window)
            out[row] = _attend(q[row], k[first:last], v[first:last], scale)
            if lse is not None:
                keys = widen(k[first:last]).repeat_interleave(q.shape[1] // k.shape[1], 1)
                lse[:, row] = ((widen(q[row]) * keys).sum(-1) * scale).logsumexp(0)
    return out


def perceiver_attention(
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
    """Attend latents to their image's patches and to themselves, as the reference does."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for image in range(q.shape[0]):
        patches = slice(bounds[image], bounds[image + 1])
        k = torch.cat([k_context[patches], k_latents[image]])
        v = torch.cat([v_context[patches], v_latents[image]])
        for latent in range(q.shape[1]):
            out[image, latent] = _attend(q[image, latent], k, v, scale)
    return out


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    shared_prefixes: Tensor | None = None,
) -> Tensor:
    """Attend new queries causally to keys in pages, as the reference does."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    page_size = k_cache.shape[2]
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for sequence, length in enumerate(context_lens.tolist()):
        begin, end = bounds[sequence], bounds[sequence + 1]
        for row in range(begin, end):
            seen = length - (end - 1 - row)
            first = 0 if window is None else max(0, seen - window)
            page = first // page_size
            pages = block_table[sequence, page : -(-seen // page_size)].long()
            keys = slice(first - page * page_size, seen - page * page_size)
            # (pages, H_KV, P, D) to (keys, H_KV, D)
            k, v = (
                cache[pages].transpose(1, 2).flatten(0, 1)[keys] for cache in (k_cache, v_cache)
            )
            out[row] = _attend(q[row], k, v, scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend one query ``q`` (H, D) to all of ``k`` and ``v`` (T, H_KV, D): (H, D)."""
    H, D = q.shape
    H_KV = k.shape[1]
    if not k.shape[0]:
        return torch.zeros_like(q)
    grouped = widen(q).reshape(H_KV, H // H_KV, 1, D).clone()
    keys = widen(k).permute(1, 2, 0).contiguous()[:, None]  # (H_KV, 1, D, T)
    values = widen(v).permute(1, 0, 2).contiguous()[:, None]  # (H_KV, 1, T, D)
    weights = (grouped @ keys * scale).softmax(-1)
    return (weights @ values).reshape(H, D).to(q.dtype)
