"""Reference of the product with a low-rank product beside it, in plain PyTorch."""

from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference.nf4 import nf4_matmul
from idefics2_kernels.reference.operations import linear
from idefics2_kernels.reference.precision import widen


def lora_linear(
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply ``x`` (..., K) by ``base`` (N, K) and add ``scale`` times x @ a.T @ b.T: (..., N).

    ``a`` is (R, K), ``b`` (N, R), and ``bias`` (N,) is added to the product with ``base``. That
    product and x @ a.T are rounded, as two layers would. The rest is fp32 or wider, rounded once.
    """
    out = nf4_matmul(x, base, bias) if isinstance(base, NF4Weight) else linear(x, base, bias)
    update = linear(widen(linear(x, a)), widen(b))
    return (widen(out) + update * scale).to(x.dtype)
