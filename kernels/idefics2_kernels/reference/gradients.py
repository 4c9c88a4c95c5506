"""Reference of the gradients, in plain PyTorch.

A gradient is autograd's of the reference operation, in the operation's dtype. That of
``flash_attention`` is a formula instead: it is a function of the forward pass's result and its
log-sum-exp, as the kernel's is, so that both can be compared with float64 on the same inputs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference import attention, nf4, operations
from idefics2_kernels.reference.precision import widen

IGNORED_TARGET = -100


def _autograd(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...], *douts: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of all ``inputs`` of ``function``, whose results have ``douts``."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
    return torch.autograd.grad(outs, leaves, douts)


def linear(
    dy: Tensor, x: Tensor | None, weight: Tensor, *, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x (..., K), ``weight`` (N, K) and bias (N,) from ``dy`` (..., N).

    The last two are ``None`` unless wanted. ``x`` may be ``None`` without ``weight_grad``.
    """
    rows = dy.flatten(0, -2)
    dweight = None
    if weight_grad:
        assert x is not None
        dweight = rows.t() @ x.flatten(0, -2)
    return dy @ weight, dweight, rows.sum(0) if bias_grad else None


def nf4_matmul(dy: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply ``dy`` (..., N) by ``weight`` (N, K): the gradient of x (..., K)."""
    return dy @ nf4.nf4_dequantize(weight).to(dy.dtype)


def lora_linear(
    dy: Tensor,
    x: Tensor | None,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    pair_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x (..., K), ``a`` (R, K) and ``b`` (N, R) from ``dy`` (..., N).

    The last two are ``None`` without ``pair_grad``, and ``x`` may be. dy @ base, dy @ b and x @ a.T
    are rounded. The rest is fp32 or wider, rounded once.
    """
    dxa = dy @ b
    dx = nf4_matmul(dy, base) if isinstance(base, NF4Weight) else dy @ base
    dx = (widen(dx) + widen(dxa) @ widen(a) * scale).to(dy.dtype)
    if not pair_grad:
        return dx, None, None
    assert x is not None
    rows, kept = widen(dy.flatten(0, -2)), x.flatten(0, -2)
    da = widen(dxa.flatten(0, -2)).t() @ widen(kept) * scale
    db = rows.t() @ widen(kept @ a.t()) * scale
    return dx, da.to(dy.dtype), db.to(dy.dtype)


def rms_norm(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    dsum: Tensor | None = None,
    *,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x`` (..., N) and ``weight`` (N,) from ``dy`` (..., N).

    ``dsum`` (..., N) is a further gradient of ``x`` and is added. The second result is ``None``
    without ``weight_grad``.
    """
    dx, dweight = _autograd(lambda x, w: operations.rms_norm(x, w, eps), (x, weight), dy)
    return dx if dsum is None else dx + dsum, dweight if weight_grad else None


def layer_norm(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dsum: Tensor | None = None,
    *,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x`` (..., N), ``weight`` and ``bias`` (N,) from ``dy`` (..., N).

    ``dsum`` (..., N) is a further gradient of ``x`` and is added. The other results are ``None``
    without ``weight_grad``.
    """
    dx, dweight, dbias = _autograd(
        lambda x, w, b: operations.layer_norm(x, w, b, eps), (x, weight, bias), dy
    )
    dx = dx if dsum is None else dx + dsum
    return (dx, dweight, dbias) if weight_grad else (dx, None, None)


def silu_mul(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of ``gate_up`` (..., 2F) from ``dy`` (..., F)."""
    return _autograd(operations.silu_mul, (gate_up,), dy)[0]


def gelu_tanh(dy: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the gradient of ``x`` (..., N) from ``dy`` (..., N), with a constant ``bias`` (N,)."""
    return _autograd(lambda x: operations.gelu_tanh(x, bias), (x,), dy)[0]


def rotary(dq: Tensor, dk: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``dq`` (T, H, D) and ``dk`` (T, H_KV, D) back by their ``positions`` (T,)."""
    cosines, sines = cos_sin.chunk(2, dim=-1)
    return operations.rotary(dq, dk, positions, torch.cat([cosines, -sines], -1))


def flash_attention(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q`` (T, H, D), ``k`` and ``v`` (T, H_KV, D) from ``dout``.

    ``out`` (T, H, D) and ``lse`` (H, T) are the results of the forward pass.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for begin, end in pairwise(cu_seqlens.tolist()):
        here = slice(begin, end)
        visible = attention.make_mask(end - begin, end - begin, causal, window, q.device)
        dq[here], dk[here], dv[here] = attend_backward(
            dout[here], q[here], k[here], v[here], out[here], lse[:, here], visible, scale
        )
    return dq, dk, dv


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries ``q`` (S, H, D) and of ``k`` and ``v`` (T, H_KV, D).

    ``out`` (S, H, D) and ``lse`` (H, S) are the results of the forward pass, and ``visible``
    (S, T) the keys that each query sees, or ``None`` for all.
    """
    S, H, D = q.shape
    H_KV = k.shape[1]
    # (H_KV, G, S, D) and (H_KV, 1, T, D)
    queries, dresults, results = (
        widen(x).unflatten(1, (H_KV, H // H_KV)).permute(1, 2, 0, 3) for x in (q, dout, out)
    )
    keys, values = (widen(x).transpose(0, 1)[:, None] for x in (k, v))
    # A query that sees no key has a log-sum-exp of minus infinity.
    sums = lse.to(queries.dtype).unflatten(0, (H_KV, H // H_KV))[..., None]
    weights = (queries @ keys.transpose(-1, -2) * scale - sums).exp()
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    delta = (dresults * results).sum(-1, keepdim=True)
    dscores = weights * (dresults @ values.transpose(-1, -2) - delta)
    dq = (dscores @ keys * scale).permute(2, 0, 1, 3).reshape(S, H, D)
    dk = (dscores.transpose(-1, -2) @ queries * scale).sum(1).transpose(0, 1)
    dv = (weights.transpose(-1, -2) @ dresults).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def perceiver_attention(
    dout: Tensor,
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``q`` (N, L, H, D) and of keys and values of patches and latents."""

    def forward(*inputs: Any) -> Tensor:
        attend: Any = attention.perceiver_attention
        out: Tensor = attend(*inputs, cu_seqlens, max_seqlen, scale=scale)
        return out

    dq, dk_context, dv_context, dk_latents, dv_latents = _autograd(
        forward, (q, k_context, v_context, k_latents, v_latents), dout
    )
    return dq, dk_context, dv_context, dk_latents, dv_latents


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weight_grad: bool,
    labeled: Tensor | None = None,
) -> tuple[Tensor, int, Tensor, Tensor | None]:
    """Return the summed cross entropy of logits, the count of targets, and the sum's gradients.

    The logits are ``hidden`` (T, K) times ``weight`` (V, K) transposed. Rows whose target (T,) is
    -100 have no loss and a gradient of zero. ``labeled`` (R,) are the other rows, ascending, found
    here unless given. Without any, the loss is 0 and all gradients are zero. The last result is
    ``None`` without ``weight_grad``.
    """
    if labeled is None:
        labeled = torch.nonzero(targets != IGNORED_TARGET)[:, 0]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        logits = widen(operations.linear(leaves[0][labeled], leaves[1]))
        loss = torch.nn.functional.cross_entropy(logits, targets[labeled].long(), reduction="sum")
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    return loss.detach(), labeled.shape[0], dhidden, dweight if weight_grad else None
