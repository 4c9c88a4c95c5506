"""What several kernels share: constants and small jitted functions."""

import triton
import triton.language as tl

from idefics2_kernels.gpu import checks

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite number of fp32

# The interpreter holds bfloat16 as integers, so that only loads, stores and casts of it are right.
UPCAST = tl.constexpr(checks.INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """Return ``a`` @ ``b`` + ``acc`` in fp32; fp32 operands are multiplied as such, not in TF32.

    Their products are summed tile by tile and only then added: one long sum would lose the digits
    that fp32 is for.
    """
    if a.dtype == tl.float32:
        product = tl.dot(a, b, tl.zeros_like(acc), input_precision="ieee")
        # an addition would be folded back into the product
        return tl.fma(product, tl.full([], 1.0, tl.float32), acc)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return fp32 ``x`` rounded to ``dtype``, to nearest even.

    Interpreted, a plain cast to bf16 truncates.
    """
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(dtype)
