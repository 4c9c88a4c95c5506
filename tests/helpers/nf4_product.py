"""Inputs of NF4 products, and what comes of them, for the tests of kernels that run on a CPU."""

from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

DTYPES = torch.bfloat16, torch.float16


def draw(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    *,
    double_quant: bool = True,
    has_bias: bool = True,
    absmax: float = 0.0,
) -> dict[str, Any]:
    """Draw x (M, K), beside which lies NaN, a weight (N, K) and a bias; no number is negative if all blocks' ``absmax`` is given."""
    wide = torch.full((M + 3, K + 24), float("nan"), dtype=dtype)
    rows = wide[1 : M + 1, 8 : K + 8]
    rows.copy_(torch.randn(M, K))
    dense = torch.randn(N, K).to(dtype) * 0.1
    if absmax:
        rows.abs_()
        dense.abs_()
    weight = nf4_quantize(dense, double_quant=double_quant)
    if absmax:
        weight.absmax.fill_(absmax)
    return {"rows": rows, "weight": weight, "bias": torch.randn(N).to(dtype) if has_bias else None}


def expected(rows: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Return the product in float64, rounded."""
    out = rows.double() @ nf4_dequantize(weight).double().t()
    return (out if bias is None else out + bias.double()).to(rows.dtype)
