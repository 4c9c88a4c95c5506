"""The product x @ dequantized(weight).T + bias with the weight in NF4.

There are four implementations, and ``choose`` selects one:

- ``few_rows`` computes up to 32 rows, or 64 for wide weights on Hopper (``nf4_few_rows``). The
  sizes and the dtype must fit, as in all of the text model.
- ``fused`` computes up to 128 rows of any size and dtype. It reads the codes once for each 16 or 64
  rows of x and dequantizes them inside the product. The rows of the weight are the rows of the
  tensor cores' tile, the rows of x its columns. N and K are divided among the programs.
- ``many_rows`` computes more rows on Hopper (``nf4_many_rows_hopper``).
- ``dequantized`` dequantizes the weight to memory once, and cuBLAS computes the product.

Each weight is rounded to the compute dtype, as the model's own dequantization does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import check_bias, check_device, check_product, flatten_rows
from idefics2_kernels.gpu.primitives import cast, dot
from idefics2_kernels.gpu.target import H100_SMS, current_arch, is_hopper, num_sms
from idefics2_kernels.matmul.split_k import k_per_split, sum_splits
from idefics2_kernels.nf4 import nf4_few_rows, nf4_few_rows_hopper, nf4_many_rows_hopper
from idefics2_kernels.nf4 import nf4_weight as tables
from idefics2_kernels.nf4.nf4_quantize import load_absmax, look_up, nf4_dequantize, unpack
from idefics2_kernels.nf4.nf4_weight import NF4Weight

BLOCK = tl.constexpr(tables.BLOCK)
# On an H100 many_rows was the fastest up to this number of rows for all sizes that ``choose`` gives
# it. For 28672 x 4096 and 256 rows it takes 110 us, dequantized 214 us. Relative to dequantized it
# takes 0.93 to 1.16 of the time for 1024 rows, and 1.05 to 1.07 for 2048 (1.08 on an H200). With so
# many rows its tiles read too much, because Triton 3.6 cannot share loads between two SMs.
MANY_ROWS = 512
# For more rows it is worth writing the dequantized weight to memory.
FUSED_ROWS = 128
# The rows of one tile of few_rows, which decodes the weight again for each tile. few_rows needs 3.1
# integer instructions per weight, fused 5.1. It has one or two barriers per tile, fused nine. Both
# round alike. On an H100 few_rows takes 0.5 to 0.72 of the time of fused for 16 rows. For 33 to 64
# rows it takes 1.02 to 1.2 of that time, but 0.57 for wide weights on Hopper. Between 16 and 33
# rows nothing was measured.
FEW_ROWS, FEW_ROWS_OF_WIDE = 32, 64


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of a product, the options of a program, and the ``programs`` that run at once."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int


def launch_config(M: int, K: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return the tile for ``M`` rows of x of ``itemsize`` bytes."""
    BLOCK_M = 16 if M <= 16 else 64
    # Dequantization is limited by instructions and needs many warps. For more rows, the partial
    # results of many splits would be as large as the weight.
    programs = 4 * H100_SMS if M <= 16 else 2 * H100_SMS
    # fp32 products do not use tensor cores, and rows that begin inside a block need an address for
    # each element. Both need many registers, so a pipeline of larger tiles would spill.
    if itemsize == 4 or K % tables.BLOCK:
        return LaunchConfig(
            BLOCK_M, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=1, programs=programs
        )
    # Before Hopper, 64 rows with three stages would spill.
    num_stages = 2 if BLOCK_M == 64 and arch < 90 else 3
    return LaunchConfig(
        BLOCK_M, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=num_stages, programs=programs
    )


@triton.jit(do_not_specialize=["M"])
def _nf4_matmul_kernel(
    x_ptr,  # (M, K)
    codes_ptr,  # (ceil(N * K / 2),)
    absmax_ptr,  # (ceil(N * K / 64),)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    table_ptr,  # (16,)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (splits, M, N), contiguous
    stride_x,
    M,
    N,
    K,
    k_split,
    # Whether a row has a whole number of blocks.
    IS_ALIGNED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    table = tl.load(table_ptr + tl.arange(0, 16))

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(split * k_split, tl.minimum((split + 1) * k_split, K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        if IS_ALIGNED:
            bytes_k = k // 2 + tl.arange(0, BLOCK_K // 2)
            mask = mask_n[:, None] & (bytes_k < K // 2)[None, :]
            packed = tl.load(
                codes_ptr + offs_n[:, None] * (K // 2) + bytes_k[None, :], mask=mask, other=0
            )
            values = unpack(table, packed)
            blocks_k = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
            blocks = offs_n[:, None] * (K // BLOCK) + blocks_k[None, :]
            mask = mask_n[:, None] & (blocks_k < K // BLOCK)[None, :]
            absmax = load_absmax(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, IS_NESTED
            )
            scales = tl.broadcast_to(absmax[:, :, None], [BLOCK_N, BLOCK_K // BLOCK, BLOCK])
            scales = tl.reshape(scales, [BLOCK_N, BLOCK_K])
        else:
            elements = offs_n[:, None] * K + offs_k[None, :]
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            packed = tl.load(codes_ptr + elements // 2, mask=mask, other=0)
            values = look_up(table, tl.where(elements % 2 == 0, packed >> 4, packed & 15))
            blocks = elements // BLOCK
            scales = load_absmax(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, IS_NESTED
            )
        weight = cast(values * scales, dtype)
        x_ptrs = x_ptr + offs_m[None, :] * stride_x + offs_k[:, None]
        x = tl.load(x_ptrs, mask=mask_m[None, :] & (offs_k < K)[:, None], other=0.0)
        acc = dot(weight, x, acc)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (split.to(tl.int64) * M + offs_m[None, :]) * N + offs_n[:, None]
    out = cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_n[:, None] & mask_m[None, :])


Way = Literal["few_rows", "fused", "many_rows", "dequantized"]


def choose(M: int, N: int, programs: int, *, few: int, many: bool) -> Way:
    """Return the implementation for ``M`` rows of x and ``N`` rows of the weight.

    ``few`` is the most rows for ``few_rows``, or 0 if it does not support the weight. ``many`` is
    whether ``many_rows`` supports the product.

    For few rows decoding is the bottleneck, and few_rows needs the fewest instructions. It decodes
    the weight again for each tile of x. Products of more than 64 rows therefore use many_rows,
    which decodes while the tensor cores are busy, for up to 256 rows at once. It is used only if
    there are enough tiles for the ``programs`` that run at once. Of the remaining products, those
    of up to 128 rows use fused, which decodes for each 64 rows. For more rows it is faster to write
    the dequantized weight to memory for cuBLAS.
    """
    if few and few >= M:
        return "few_rows"
    if (
        many
        and FEW_ROWS_OF_WIDE < M <= MANY_ROWS
        and nf4_many_rows_hopper.keeps_busy(M, N, programs)
    ):
        return "many_rows"
    return "fused" if M <= FUSED_ROWS else "dequantized"


def nf4_matmul(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (..., N).

    Sums are fp32, rounded once. ``choose`` selects the implementation. The last axis of ``x`` must
    be contiguous. Other strides are free.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is none of bf16, fp16, fp32, or they differ.
    """
    rows = _flatten_checked(x, weight, bias)
    on_hopper = is_hopper()
    few = 0
    if nf4_few_rows.supports(weight):
        is_wide = on_hopper and weight.shape[0] >= nf4_few_rows_hopper.WIDE
        few = FEW_ROWS_OF_WIDE if is_wide else FEW_ROWS
    way = choose(
        rows.shape[0],
        weight.shape[0],
        num_sms(x.device),
        few=few,
        many=on_hopper and nf4_many_rows_hopper.supports(rows, weight),
    )
    ways: dict[Way, Callable[..., Tensor]] = {
        "few_rows": few_rows,
        "fused": fused,
        "many_rows": many_rows,
        "dequantized": dequantized,
    }
    return ways[way](x, weight, bias)


def dequantized(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``nf4_matmul`` by dequantizing the whole weight and calling cuBLAS."""
    _flatten_checked(x, weight, bias)
    return torch.nn.functional.linear(x, nf4_dequantize(weight), bias)


def many_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``nf4_matmul`` by the kernel for many rows, on Hopper.

    Any number of rows is allowed, but not every weight.

    Raises:
        ValueError: The rows of ``weight`` are not a multiple of 64 long, or ``x`` or the codes are
            not aligned for TMA.
        TypeError: ``weight`` is fp32.
    """
    rows = _flatten_checked(x, weight, bias)
    return nf4_many_rows_hopper.multiply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def few_rows(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, *, plain: bool = False
) -> Tensor:
    """Compute ``nf4_matmul`` by a kernel for few rows.

    Any number of rows is allowed, but not every weight. On Hopper some calls use Gluon kernels,
    unless ``plain``.

    Raises:
        ValueError: The rows of ``weight`` are not a multiple of 256 long, or its codes do not begin
            at a multiple of 4 bytes.
        TypeError: ``weight`` is fp32.
    """
    rows = _flatten_checked(x, weight, bias)
    product = nf4_few_rows.multiply(rows, weight, bias, plain=plain)
    return product.view(*x.shape[:-1], weight.shape[0])


def fused(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``nf4_matmul`` by the kernel that dequantizes inside the product, for any M."""
    rows = _flatten_checked(x, weight, bias)
    (M, K), N = rows.shape, weight.shape[0]
    config = launch_config(M, K, x.itemsize, current_arch())
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    k_split = k_per_split(tiles_m * tiles_n, K, config.BLOCK_K, config.programs)
    splits = max(triton.cdiv(K, k_split), 1)
    dtype = torch.float32 if splits > 1 else x.dtype
    out = torch.empty((splits, M, N), dtype=dtype, device=x.device)
    if out.numel():
        _nf4_matmul_kernel[(tiles_n, splits, tiles_m)](
            rows,
            weight.codes,
            *weight.absmax_parts,
            tables.nf4_code(x.device),
            bias,
            out,
            rows.stride(0),
            M,
            N,
            K,
            k_split,
            IS_ALIGNED=K % tables.BLOCK == 0,
            IS_NESTED=weight.is_nested,
            HAS_BIAS=bias is not None and splits == 1,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if splits > 1:
        out = sum_splits(out, bias, x.dtype)
    return out.view(*x.shape[:-1], N)


def _flatten_checked(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Check the arguments and return ``x`` as rows (M, K)."""
    K = check_product(x)
    if len(weight.shape) != 2 or weight.shape[1] != K:
        raise ValueError(f"weight must have shape (*, {K}), got {weight.shape}")
    if weight.dtype is not x.dtype:
        wanted, got = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, weight.dtype))
        raise TypeError(f"weight must be {wanted}, got {got}")
    check_bias(bias, weight.shape[0], x.dtype)
    check_device(x=x, weight=weight.codes, bias=bias)
    return flatten_rows(x)
