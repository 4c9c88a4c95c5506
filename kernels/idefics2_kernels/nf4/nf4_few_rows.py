"""The product x @ dequantized(weight).T + bias with the weight in NF4, for few rows.

Decoding is the bottleneck. Each warp of a program has 16 rows of the weight and processes 256
columns at a time. These are four blocks of each row, one block per thread. The 16 numbers of a
block are computed once and looked up by permuting bytes (``dequantize_triton``).

On Hopper a decoded weight stays in the registers of its thread, as the left operand of the tensor
cores' product. The layout of this operand determines what a thread loads: a warp has 16 rows, and
four threads share the column pairs of a row in turn. Because a thread decodes whole blocks, the
order of the columns differs from that in memory. x is brought into the same order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.primitives import cast, dot
from idefics2_kernels.gpu.target import H100_SMS, current_arch, is_hopper
from idefics2_kernels.matmul.split_k import k_per_split, sum_splits
from idefics2_kernels.nf4 import nf4_few_rows_hopper, nf4_gemv_hopper
from idefics2_kernels.nf4 import nf4_weight as tables
from idefics2_kernels.nf4.dequantize_triton import code_values, decode
from idefics2_kernels.nf4.nf4_quantize import load_absmax
from idefics2_kernels.nf4.nf4_weight import NF4Weight

BLOCK = tl.constexpr(tables.BLOCK)
# A block for each of the four threads that share a row.
BLOCK_K = 256


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of x in a tile, the options of a program, and the ``programs`` that run at once.

    Each warp has 16 rows of the weight.
    """

    BLOCK_M: int
    num_warps: int
    num_stages: int
    programs: int


def launch_config(M: int, arch: int) -> LaunchConfig:
    """Return the launch options for ``M`` rows of x."""
    # Measured on an H100 at 28672 x 4096 and 6144 x 4096. One row takes 46 and 14 us, and with 8
    # warps 55 and 19 us. 16 rows take 58 and 21 us, and with 4 warps 70 and 19 us. Other numbers of
    # up to 32 rows were not measured.
    if M <= 16:
        num_warps, programs = (4, 4 * H100_SMS) if M <= 8 else (8, 2 * H100_SMS)
        return LaunchConfig(BLOCK_M=16, num_warps=num_warps, num_stages=3, programs=programs)
    # For more rows the partial results have as many bytes as the weight. x is read once for each
    # tile of the weight, which is even more. Tiles of 128 weight rows halve that. 64 rows of x at
    # 28672 x 4096 take 111 us, in tiles of 64 weight rows 151 us, and with twice the programs 128
    # us. Before Hopper the left operand passes through shared memory, and 64 rows would spill.
    if M > 32 and arch == 90:
        return LaunchConfig(BLOCK_M=64, num_warps=8, num_stages=2, programs=2 * H100_SMS)
    return LaunchConfig(BLOCK_M=32, num_warps=4, num_stages=2, programs=3 * H100_SMS)


@triton.jit(do_not_specialize=["M", "steps", "steps_split"])
def _few_rows_kernel(
    x_ptr,  # (M, K)
    codes_ptr,  # (N * K / 8,), words of eight codes
    absmax_ptr,  # (N * K / 64,)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (splits, M, N), contiguous
    stride_x,
    M,
    N,
    # K / BLOCK_K.
    steps,
    steps_split,
    IS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    BLOCK_N: tl.constexpr = 16 * WARPS
    BLOCKS: tl.constexpr = BLOCK_K // BLOCK
    split = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    # The flat indices of the weight's blocks, in the order in which lanes, warps and registers hold
    # the product's left operand: the four blocks of a row, 8 rows, every 16th row, the 8 rows in
    # between. If the layout were left to the compiler, it would differ between releases. Rows past
    # the end read the last row again and are not stored.
    block = tl.arange(0, BLOCK_N * BLOCKS)
    rows = block // 4 % 8 + block // 32 % WARPS * 16 + block // (32 * WARPS) * 8
    rows = tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK_N + rows, N - 1)
    blocks = rows * (steps * BLOCKS) + block % BLOCKS
    words_ptrs = codes_ptr + blocks[:, None] * (BLOCK // 8) + tl.arange(0, 8)[None, :]
    everywhere = tl.full(blocks.shape, True, tl.int1)
    # The words of x, in a similar order: the four blocks, even and odd word (32 bytes, a sector),
    # rows, pairs of words.
    word = tl.arange(0, BLOCK_M * BLOCK_K // 8)
    # Rows of x past the end are masked. If they were clamped, all programs would wait for the same
    # few cache lines.
    rows = tl.program_id(2).to(tl.int64) * BLOCK_M + word // 8 % BLOCK_M
    mask_x = (rows < M)[:, None]
    offs_k = word % 4 * BLOCK + word // 4 % 2 * 8 + word // (8 * BLOCK_M) * 16
    x_ptrs = x_ptr + (rows * stride_x + offs_k)[:, None] + tl.arange(0, 8)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(split * steps_split, tl.minimum((split + 1) * steps_split, steps)):
        words = tl.load(words_ptrs + step * (BLOCK_K // 8))
        absmax = load_absmax(
            absmax_ptr,
            nested_absmax_ptr,
            nested_code_ptr,
            offset_ptr,
            blocks + step * BLOCKS,
            everywhere,
            IS_NESTED,
        )[:, None]
        x = tl.load(x_ptrs + step * BLOCK_K, mask=mask_x, other=0.0)
        lows, highs = code_values(absmax, dtype)
        weight = decode(lows, highs, words, dtype)
        # The axes are (8 of 16 rows, WARPS, row, block, word, code of a byte, byte, half of a
        # word). The permutation orders the columns by word, half of a word, byte, block, code.
        weight = tl.reshape(weight, [2, WARPS, 8, BLOCKS, 8, 2, 2, 2])
        weight = tl.permute(weight, (1, 0, 2, 4, 7, 6, 3, 5))
        weight = tl.reshape(weight, [BLOCK_N, BLOCK_K])
        x = tl.permute(tl.reshape(x, [4, BLOCK_M, 2, BLOCKS, 2, 2, 2]), (0, 2, 4, 5, 3, 6, 1))
        x = tl.reshape(x, [BLOCK_K, BLOCK_M])
        acc = dot(weight, x, acc)

    mask_n = offs_n < N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (split.to(tl.int64) * M + offs_m[None, :]) * N + offs_n[:, None]
    out = cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_n[:, None] & (offs_m < M)[None, :])


def supports(weight: NF4Weight) -> bool:
    """Return whether the kernel can multiply by ``weight``.

    Rows must be a multiple of 256 long, codes aligned to 4 bytes, and the dtype 16 bits wide.
    """
    return _find_obstacle(weight) is None


def _find_obstacle(weight: NF4Weight) -> Exception | None:
    if weight.dtype is torch.float32:
        return TypeError("weight must be bfloat16 or float16, got float32")
    if not weight.shape[1] or weight.shape[1] % BLOCK_K:
        return ValueError(f"weight must have rows of a multiple of 256, got {weight.shape}")
    if weight.codes.storage_offset() % 4:
        offset = weight.codes.storage_offset()
        return ValueError(f"codes must begin at a multiple of 4 bytes, got {offset}")
    return None


def multiply(
    rows: Tensor, weight: NF4Weight, bias: Tensor | None, *, plain: bool = False
) -> Tensor:
    """Multiply ``rows`` (M, K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (M, N).

    On Hopper faster kernels compute the calls that ``nf4_gemv_hopper`` or ``nf4_few_rows_hopper``
    ``supports``, unless ``plain``.

    Raises:
        ValueError: The rows of ``weight`` are not a multiple of 256 long, or its codes do not begin
            at a multiple of 4 bytes.
        TypeError: ``weight`` is fp32.
    """
    if (obstacle := _find_obstacle(weight)) is not None:
        raise obstacle
    if not plain and is_hopper():
        if nf4_gemv_hopper.supports(rows, weight):
            return nf4_gemv_hopper.multiply(rows, weight, bias)
        if nf4_few_rows_hopper.supports(rows, weight):
            return nf4_few_rows_hopper.multiply(rows, weight, bias)
    (M, K), N = rows.shape, weight.shape[0]
    config = launch_config(M, current_arch())
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, 16 * config.num_warps)
    k_split = k_per_split(tiles_m * tiles_n, K, BLOCK_K, config.programs)
    splits = triton.cdiv(K, k_split)
    dtype = torch.float32 if splits > 1 else rows.dtype
    out = torch.empty((splits, M, N), dtype=dtype, device=rows.device)
    if out.numel():
        _few_rows_kernel[(tiles_n, splits, tiles_m)](
            rows,
            weight.codes.view(torch.int32),
            *weight.absmax_parts,
            bias,
            out,
            rows.stride(0),
            M,
            N,
            K // BLOCK_K,
            k_split // BLOCK_K,
            IS_NESTED=weight.is_nested,
            HAS_BIAS=bias is not None and splits == 1,
            BLOCK_M=config.BLOCK_M,
            BLOCK_K=BLOCK_K,
            WARPS=config.num_warps,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return sum_splits(out, bias, rows.dtype) if splits > 1 else out[0]
