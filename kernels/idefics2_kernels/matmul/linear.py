"""The dense product x @ weight.T + bias.

For many rows PyTorch calls cuBLAS, which is the fastest. For few rows the time is that of reading
the weight once. ``split_k`` divides N and K among the programs. The rows of the weight are the rows
of the tensor cores' tile. The rows of x, padded to 16, are its columns. ``tiled`` multiplies any
number of rows in one tile shape and one order of K, so a row's result never depends on the other
rows of the batch.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.activation import gelu_tanh
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
    dependent_options,
    gdc_launch_dependents,
    gdc_wait,
    prefetch_lines,
)
from idefics2_kernels.gpu.primitives import cast, dot
from idefics2_kernels.gpu.target import H100_SMS
from idefics2_kernels.matmul.split_k import k_per_split, shared_buffers, store_product

# The narrowest tile of the tensor cores that supports every dtype.
FEW_ROWS = 16
# Cache lines of each row of the weight to prefetch: 64 KB, which fill a pipeline.
PREFETCHED = tl.constexpr(8)
# Programs of split_k that run at once. The pipelines of two programs fit on an SM.
PROGRAMS = 2 * H100_SMS


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of a product, and the warps and pipeline stages of a program."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def split_k_launch_config(itemsize: int) -> LaunchConfig:
    """Return the tile of ``split_k`` for numbers of ``itemsize`` bytes."""
    # A stage holds 16 KB of the weight. The pipelines of two programs then have enough loads in
    # flight for an SM's share of the bandwidth.
    if itemsize == 4:
        return LaunchConfig(BLOCK_M=FEW_ROWS, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4)
    return LaunchConfig(BLOCK_M=FEW_ROWS, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)


def tiled_launch_config(itemsize: int) -> LaunchConfig:
    """Return the tile of ``tiled`` for numbers of ``itemsize`` bytes."""
    # The tile depends only on the dtype. A tile that depended on M, N or K would change the order
    # of summation.
    if itemsize == 4:
        return LaunchConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)
    return LaunchConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["counters_ptr"])
def _split_k_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (M, N), contiguous
    partials_ptr,  # (splits, M, N), if IS_SPLIT
    counters_ptr,  # (tiles,), if IS_SPLIT
    stride_x,
    stride_weight,
    M,
    N,
    K,
    k_split,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    gdc_launch_dependents(IS_DEPENDENT)
    split = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = split * k_split + tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    weight_ptrs = weight_ptr + offs_n[:, None] * stride_weight + offs_k[None, :]
    x_ptrs = x_ptr + offs_m[None, :] * stride_x + offs_k[:, None]
    # The previous kernel may still be computing x. The weight is already in memory.
    if IS_DEPENDENT and split * k_split < K:
        rows = tl.minimum(offs_n, N - 1)
        prefetch_lines(weight_ptr + rows * stride_weight, split * k_split, K, PREFETCHED)
    gdc_wait(IS_DEPENDENT)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(split * k_split, tl.minimum((split + 1) * k_split, K), BLOCK_K):
        mask_k = k + tl.arange(0, BLOCK_K) < K
        weight = tl.load(weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask_m[None, :] & mask_k[:, None], other=0.0)
        acc = dot(weight, x, acc)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    store_product(
        acc,
        bias_ptr,
        out_ptr,
        partials_ptr,
        counters_ptr,
        offs_n,
        offs_m,
        M,
        N,
        HAS_BIAS,
        IS_SPLIT,
    )


@triton.jit(do_not_specialize=["M"])
def _tiled_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (M, N), contiguous
    stride_x,
    stride_weight,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles are numbered along M first, so that neighboring programs read the same weight rows.
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_x + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n[None, :] * stride_weight + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    out = cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_m[:, None] & mask_n[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (..., N).

    Sums are fp32, rounded once. Up to 16 rows are multiplied by ``split_k``, more by cuBLAS. The
    last axes must be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = _flatten_checked(x, weight, bias)
    if rows.shape[0] > FEW_ROWS:
        return torch.nn.functional.linear(x, weight, bias)
    return split_k(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply GELU in the tanh form to the result of ``linear``: (..., N).

    On a GPU, in 16 bits, with a bias and more than 16 rows, cuBLAS applies it to its fp32 sums and
    rounds once. In all other cases the product is rounded before GELU, as in the reference.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = _flatten_checked(x, weight, bias)
    if bias is None or x.device.type != "cuda" or x.itemsize != 2 or rows.shape[0] <= FEW_ROWS:
        return gelu_tanh(linear(x, weight, bias))
    out: Tensor = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def split_k(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``linear`` by the kernel for few rows.

    Any number of rows is allowed. Up to 16, a row's result does not depend on the other rows.
    """
    rows = _flatten_checked(x, weight, bias)
    (M, K), N = rows.shape, weight.shape[0]
    config = split_k_launch_config(x.itemsize)
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    k_split = k_per_split(tiles_m * tiles_n, K, config.BLOCK_K, PROGRAMS)
    splits = max(triton.cdiv(K, k_split), 1)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel():
        partials, arrived = shared_buffers(out, splits, tiles_m * tiles_n)
        _split_k_kernel[(tiles_n, splits, tiles_m)](
            rows,
            weight,
            bias,
            out,
            partials,
            arrived,
            rows.stride(0),
            weight.stride(0),
            M,
            N,
            K,
            k_split,
            HAS_BIAS=bias is not None,
            IS_SPLIT=splits > 1,
            **dependent_options(),
            **asdict(config),
        )
    return out.view(*x.shape[:-1], N)


def tiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``linear`` in one tile shape and one order of K for every M.

    Equal rows give equal bits in any batch.
    """
    rows = _flatten_checked(x, weight, bias)
    (M, K), N = rows.shape, weight.shape[0]
    config = tiled_launch_config(x.itemsize)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel():
        _tiled_kernel[(triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)](
            rows,
            weight,
            bias,
            out,
            rows.stride(0),
            weight.stride(0),
            M,
            N,
            K,
            HAS_BIAS=bias is not None,
            **asdict(config),
        )
    return out.view(*x.shape[:-1], N)


def _flatten_checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Check the arguments and return ``x`` as rows (M, K)."""
    K = check_product(x)
    check_shape("weight", weight, (None, K))
    check_dtype("weight", weight, x.dtype)
    check_rows("weight", weight)
    check_bias(bias, weight.shape[0], x.dtype)
    check_device(x=x, weight=weight, bias=bias)
    return flatten_rows(x)
