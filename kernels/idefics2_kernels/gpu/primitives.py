"""Constants and small jitted functions that several kernels share."""

import triton
import triton.language as tl

from idefics2_kernels.gpu import checks

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The lowest finite number of fp32.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# The interpreter stores bfloat16 as integers, so only its loads, stores and casts are right.
UPCAST = tl.constexpr(checks.INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """Return ``a`` @ ``b`` + ``acc`` in fp32; fp32 operands are not rounded to TF32.

    For fp32 operands, the products of a tile are summed first and then added to ``acc``. One long
    sum would lose precision.
    """
    if a.dtype == tl.float32:
        product = tl.dot(a, b, tl.zeros_like(acc), input_precision="ieee")
        # The compiler would fold a plain addition back into the product.
        return tl.fma(product, tl.full([], 1.0, tl.float32), acc)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return fp32 ``x`` rounded to ``dtype``, to nearest even.

    In the interpreter a plain cast to bf16 would truncate.
    """
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        # NaN stays NaN.
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)
