"""Inputs and expected results of NF4 products, for the tests of kernels that run on a CPU."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

DTYPES = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Product:
    """The sizes of x (M, K) and a weight (N, K), and the other properties of a product."""

    M: int
    N: int
    K: int
    _: KW_ONLY
    double_quant: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    # Absmax of all blocks, if not 0. Then no number is negative.
    absmax: float = 0.0

    def inputs(self) -> dict[str, Any]:
        """Draw x, surrounded by NaN, a weight and a bias."""
        wide = torch.full((self.M + 3, self.K + 24), float("nan"), dtype=self.dtype)
        rows = wide[1 : self.M + 1, 8 : self.K + 8]
        rows.copy_(torch.randn(self.M, self.K))
        dense = torch.randn(self.N, self.K).to(self.dtype) * 0.1
        if self.absmax:
            rows.abs_()
            dense.abs_()
        weight = nf4_quantize(dense, double_quant=self.double_quant)
        if self.absmax:
            weight.absmax.fill_(self.absmax)
        bias = torch.randn(self.N).to(self.dtype) if self.bias else None
        return {"rows": rows, "weight": weight, "bias": bias}


def expected(rows: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Return the product, computed in float64 and rounded to the dtype of ``rows``."""
    out = rows.double() @ nf4_dequantize(weight).double().t()
    return (out if bias is None else out + bias.double()).to(rows.dtype)


def is_noticed(run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> bool:
    """Return whether ``run`` with a changed kernel reads past a tensor or gives another product."""
    try:
        out = run(inputs)
    except (AssertionError, IndexError):
        return True
    return not torch.equal(out, expected(**inputs))
