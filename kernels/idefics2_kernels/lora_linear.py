"""The product x @ base.T with a low-rank product (x @ a.T) @ b.T added to it (LoRA, Hu et al., 2021).

There are two launches beside that of the base. ``linear`` computes x @ a.T, which is narrow, before
the base's product, whose programs start and prefetch meanwhile. Then one kernel multiplies it by b
and adds the result where the base's output is. Each of its programs has one tile of the output,
which it reads and writes once. Projections with a common x are one product: a has the rows of all,
and b is block-diagonal.
"""

from dataclasses import asdict, dataclass

import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import (
    check_bias,
    check_device,
    check_dtype,
    check_product,
    check_rows,
    check_shape,
    flatten_rows,
)
from idefics2_kernels.gpu.dependent_launch import (
    count_lines,
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch_lines,
)
from idefics2_kernels.gpu.primitives import cast, dot
from idefics2_kernels.matmul.linear import FEW_ROWS, linear
from idefics2_kernels.nf4.nf4_matmul import nf4_matmul
from idefics2_kernels.nf4.nf4_weight import NF4Weight

# The most columns of b that a program holds at once, and the fewest that the tensor cores multiply.
_MAX_BLOCK_R, _MIN_BLOCK_R = 64, 16


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of the output and of the rank, and the warps of a program."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int


def launch_config(M: int, R: int) -> LaunchConfig:
    """Return the tile for ``M`` rows of x and rank ``R``.

    The tiles were not measured yet. For few rows they are small, so that the narrowest weights of
    the 8B model have 64 programs. For more rows a program reads and writes 16 KB in 16 bits.
    """
    BLOCK_R = min(max(triton.next_power_of_2(R), _MIN_BLOCK_R), _MAX_BLOCK_R)
    if M <= FEW_ROWS:
        return LaunchConfig(BLOCK_M=FEW_ROWS, BLOCK_N=64, BLOCK_R=BLOCK_R, num_warps=4)
    return LaunchConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_R=BLOCK_R, num_warps=8)


@triton.jit(do_not_specialize=["M"])
def _add_low_rank_kernel(
    xa_ptr,  # (M, R), contiguous
    b_ptr,  # (N, R)
    out_ptr,  # (M, N), contiguous
    stride_b,
    scale,
    M,
    N,
    R,
    IS_DEPENDENT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    # The previous kernels may still be computing xa and the output. b is already in memory.
    if IS_DEPENDENT:
        prefetch_lines(b_ptr + tl.minimum(offs_n, N - 1) * stride_b, 0, R, LINES)
    gdc_wait(IS_DEPENDENT)

    mask = mask_m[:, None] & mask_n[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        xa_ptrs = xa_ptr + offs_m[:, None] * R + offs_r[None, :]
        xa = tl.load(xa_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        b_ptrs = b_ptr + offs_n[None, :] * stride_b + offs_r[:, None]
        b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
        acc = dot(xa, b, acc)
    total = out.to(tl.float32) + acc * scale
    tl.store(out_ptrs, cast(total, out_ptr.dtype.element_ty), mask=mask)


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
    product and x @ a.T are rounded, as by ``linear`` and ``nf4_matmul``. Other sums are fp32,
    rounded once. The last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = _flatten_checked(x, base, a, b, bias)
    xa = linear(rows, a)
    out = nf4_matmul(rows, base, bias) if isinstance(base, NF4Weight) else linear(rows, base, bias)
    (M, N), R = out.shape, a.shape[0]
    if out.numel() and R:
        config = launch_config(M, R)
        _add_low_rank_kernel[(triton.cdiv(N, config.BLOCK_N), triton.cdiv(M, config.BLOCK_M))](
            xa,
            b,
            out,
            b.stride(0),
            # A whole number would be specialized.
            float(scale),
            M,
            N,
            R,
            LINES=count_lines(R * b.itemsize),
            **dependent_options(),
            **asdict(config),
        )
    return out.view(*x.shape[:-1], N)


def _flatten_checked(
    x: Tensor, base: Tensor | NF4Weight, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    """Check the arguments and return ``x`` as rows (M, K)."""
    K = check_product(x)
    if len(base.shape) != 2 or base.shape[1] != K:
        raise ValueError(f"base must have shape (*, {K}), got {tuple(base.shape)}")
    if base.dtype is not x.dtype:
        wanted, got = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, base.dtype))
        raise TypeError(f"base must be {wanted}, got {got}")
    N = base.shape[0]
    check_shape("a", a, (None, K))
    check_shape("b", b, (N, a.shape[0]))
    for name, matrix in (("a", a), ("b", b)):
        check_dtype(name, matrix, x.dtype)
        check_rows(name, matrix)
    check_bias(bias, N, x.dtype)
    dense = base.codes if isinstance(base, NF4Weight) else base
    if isinstance(base, Tensor):
        check_rows("base", base)
    check_device(x=x, base=dense, a=a, b=b, bias=bias)
    return flatten_rows(x)
