"""The product x @ dequantized(weight).T + bias with the weight in NF4.

Up to 128 rows, codes are read once for each 16 or 64 rows and dequantized on their way to the
tensor cores: the weight's rows are those of the tile, x its columns; N and K are cut among the
programs. Each weight is rounded to the compute dtype, as the model's own dequantization rounds it.
For more rows the dequantized weight is written out once and cuBLAS multiplies. Where sizes and
dtype allow it, as in all of the text model, ``nf4_few_rows`` takes up to 32, or 64, and on Hopper
``nf4_many_rows_hopper`` takes more: ``choose`` says which way is taken.
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
# Up to so many rows many_rows was the fastest on an H100 wherever it is taken (28672 x 4096, 256
# rows: 110 us, by cuBLAS with the dequantized weight 214); at 1024 it takes 0.93 to 1.16 of the
# latter's time, at 2048 1.05 to 1.07: for so many rows of x its tiles read too much (an H200:
# 1.08), as Triton 3.6 cannot have two SMs share what they read.
MANY_ROWS = 512
FUSED_ROWS = 128  # more pay for the dequantized weight's way through memory
# One tile of few_rows, which decodes for each tile anew. It has 3.1 instructions a weight for the
# integer units where fused has 5.1, a barrier or two a tile in place of nine, and the same
# roundings. On an H100 it takes 0.5 to 0.72 of fused's time at 16 rows; at 64, a tile that 33 rows
# fill as well, 1.02 to 1.2, but for wide weights on Hopper, 0.57. What lies between 16 and 33 was
# not measured.
FEW_ROWS, FEW_ROWS_OF_WIDE = 32, 64


@dataclass(frozen=True)
class LaunchConfig:
    """How a product is cut: tile of rows, of columns and of K.

    ``num_warps`` and ``num_stages`` are those of a program; ``programs`` run at once.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int


def launch_config(M: int, K: int, itemsize: int, arch: int) -> LaunchConfig:
    """Return how a product of ``M`` rows of x of ``itemsize`` bytes is cut."""
    BLOCK_M = 16 if M <= 16 else 64
    # Dequantizing is bound by instructions and needs many warps. For more rows, the partial results
    # of many splits would be as large as the weight.
    programs = 4 * H100_SMS if M <= 16 else 2 * H100_SMS
    # fp32 products take no tensor cores, and rows that begin inside a block an address for each
    # element: both need registers that a pipeline of larger tiles would spill
    if itemsize == 4 or K % tables.BLOCK:
        return LaunchConfig(
            BLOCK_M, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=1, programs=programs
        )
    # before Hopper 64 rows with three stages spill
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
    IS_ALIGNED: tl.constexpr,  # a row is a whole number of blocks
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
    """Return which way takes ``M`` rows of x and ``N`` of the weight.

    ``nf4_few_rows`` may take up to ``few`` rows, 0 for none; ``many`` says whether
    ``nf4_many_rows_hopper`` can take them.

    For few rows decoding decides, and few_rows has the fewest instructions. It decodes anew for
    each tile, so more than 64 go to many_rows, which decodes while the tensor cores are busy, for
    up to 256 rows at once, if its tiles are enough for the ``programs`` that run at once. For what
    is left, fused decodes for each 64 rows too, which up to 128 costs less than the dequantized
    weight's way through memory to cuBLAS.
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

    Sums are fp32, rounded once. Any strides of ``x`` but a contiguous last axis. ``choose`` says
    how.

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
    """``nf4_matmul`` by cuBLAS, once the whole weight is dequantized."""
    _flatten_checked(x, weight, bias)
    return torch.nn.functional.linear(x, nf4_dequantize(weight), bias)


def many_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``nf4_matmul`` by the kernel for many rows, on Hopper.

    It takes any number, but not every weight.

    Raises:
        ValueError: Rows of ``weight`` are no multiple of 64, or TMA cannot read ``x`` or the codes
        where they lie. TypeError: ``weight`` is fp32.
    """
    rows = _flatten_checked(x, weight, bias)
    return nf4_many_rows_hopper.multiply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def few_rows(
    x: Tensor, weight: NF4Weight, bias: Tensor | None = None, *, plain: bool = False
) -> Tensor:
    """``nf4_matmul`` by the kernels for few rows; they take any number, but not every weight.

    On Hopper there are two, one of them for any call: ``plain``.

    Raises:
        ValueError: Rows of ``weight`` are no multiple of 256 columns, or its codes do not begin at
        a multiple of 4 bytes. TypeError: ``weight`` is fp32.
    """
    rows = _flatten_checked(x, weight, bias)
    product = nf4_few_rows.multiply(rows, weight, bias, plain=plain)
    return product.view(*x.shape[:-1], weight.shape[0])


def fused(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``nf4_matmul`` by the kernel that dequantizes as it multiplies.

    It takes any number of rows.
    """
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
