"""Row of the catalog: the gradient of attention within packed sequences."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.attention import flash_attention as forward
from idefics2_kernels.backward import flash_attention
from idefics2_kernels.catalog.attention import visible_pairs
from idefics2_kernels.catalog.flash_attention import flash_cases, flash_inputs, flash_rows
from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.gradients import REFERENCE_GRADIENTS
from idefics2_kernels.ops import REFERENCE

Triple = tuple[Tensor, Tensor, Tensor]


def flash_gradient_rows(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rows: Tensor | None = None,
    magnitudes: bool = False,
    **options: Any,
) -> Triple:
    """Compute the reference's gradient of ``flash_attention``, or only its ``rows`` (ascending).

    Rows are computed head by head. With ``magnitudes`` every term of a sum is replaced by its
    absolute value, in float64.
    """
    if rows is None and not magnitudes:
        return REFERENCE_GRADIENTS.flash_attention(
            dout, q, k, v, out, lse, cu_seqlens, max_seqlen, **options
        )
    T, H, D = q.shape
    scale = D**-0.5 if options.get("scale") is None else options["scale"]
    rows = torch.arange(T, device=q.device) if rows is None else rows
    wide = torch.float64 if magnitudes else torch.promote_types(q.dtype, torch.float32)
    groups = H // k.shape[1]
    dq, dk, dv = (
        torch.zeros(len(rows), *x.shape[1:], dtype=wide, device=q.device) for x in (q, k, v)
    )
    for begin, end in pairwise(cu_seqlens.tolist()):
        chosen = (rows >= begin) & (rows < end)
        mine = rows[chosen] - begin
        for head in range(H):
            head_kv = head // groups
            parts = [x[begin:end, head].to(wide) for x in (q, dout, out)]
            parts += [x[begin:end, head_kv].to(wide) for x in (k, v)]
            own = _head_gradient(
                parts, lse[head, begin:end].to(wide), mine, scale, magnitudes, options
            )
            dq[chosen, head] = own[0]
            dk[chosen, head_kv] += own[1]
            dv[chosen, head_kv] += own[2]
    return (dq, dk, dv) if magnitudes else (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


def _head_gradient(
    parts: list[Tensor],
    lse: Tensor,
    mine: Tensor,
    scale: float,
    magnitudes: bool,
    options: dict[str, Any],
) -> Triple:
    """Return the gradients of queries, keys and values ``mine`` of one head of one sequence."""
    q, dout, out, k, v = parts
    window = options.get("window")
    places = torch.arange(len(q), device=q.device)

    def weights(queries: Tensor, keys: Tensor) -> Tensor:
        distance = queries[:, None] - keys
        seen = distance >= 0 if options["causal"] else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance.abs() < window
        found = (q[queries] @ k[keys].t() * scale - lse[queries, None]).exp()
        return found.masked_fill(~seen, 0.0)

    of_queries, of_keys = weights(mine, places), weights(places, mine)
    if magnitudes:
        q, dout, out, k, v = (x.abs() for x in parts)
    delta = (dout * out).sum(-1, keepdim=True) * (-1 if magnitudes else 1)
    dq = of_queries * (dout[mine] @ v.t() - delta[mine]) @ k * scale
    dk = (of_keys * (dout @ v[mine].t() - delta)).t() @ q * scale
    return dq, dk, of_keys.t() @ dout


def _inputs(case: Case, device: torch.device) -> Inputs:
    inputs = flash_inputs(case, device)
    q = inputs["q"]
    T, H, D = q.shape
    lse = torch.zeros((H, T), dtype=torch.float32, device=device)
    if device.type == "meta":
        out = torch.empty((T, H, D), dtype=q.dtype, device=device)
    elif case.where == "any":
        out = torch.zeros_like(q)
        if T:
            out = REFERENCE.flash_attention(**inputs, lse=lse)
    else:
        # Whole scores of these cases do not fit on a GPU.
        out = forward.flash_attention(**inputs, lse=lse)
    scale = case.dims.get("magnitude", 1.0)
    dout = normal(T, H, D, dtype=q.dtype, device=device, scale=scale)
    return {"dout": dout, **inputs, "out": out, "lse": lse}


def _cases() -> tuple[Case, ...]:
    """Return the cases of the forward pass, a few of them changed."""
    changed: dict[str, dict[str, Any]] = {
        # The interpreter takes long for products in fp32.
        "ragged-float32": {"lengths": (35, 1, 0, 40)},
        "causal-float32": {"lengths": (50, 17)},
        # Larger scores would have weights below fp32's smallest number.
        "large": {"magnitude": 3.0},
    }
    # Weights next to zero are lost in fp16.
    dtypes = {"large": torch.bfloat16}
    return tuple(
        replace(
            case,
            dims={**case.dims, **changed.get(case.name, {})},
            dtype=dtypes.get(case.name, case.dtype),
        )
        for case in flash_cases()
    )


def _cost(case: Case) -> Cost:
    dims = case.dims
    tokens, heads = sum(dims["lengths"]), dims["H"] + dims["H_KV"]
    pairs = sum(visible_pairs(n, dims["causal"], dims.get("window")) for n in dims["lengths"])
    # Five products of the queries and keys that see each other. Eight tensors of heads are read or
    # written.
    return Cost(
        bytes=4 * tokens * heads * dims["D"] * case.dtype.itemsize,
        flops=10 * pairs * dims["H"] * dims["D"],
    )


FLASH_ATTENTION_GRADIENT = KernelSpec(
    name="flash_attention_backward",
    make_inputs=_inputs,
    cases=_cases(),
    cost=_cost,
    implementations={"triton": flash_attention.flash_attention_backward},
    checked_rows=flash_rows,
    reference=flash_gradient_rows,
    # A query's gradient is zero if it sees one key, because its terms cancel.
    terms=lambda **inputs: flash_gradient_rows(**inputs, magnitudes=True),
)
