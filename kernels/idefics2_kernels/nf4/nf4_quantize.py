"""NF4 quantization and dequantization, in tiles whose rows are blocks of 64 elements.

Double quantization needs two launches. PyTorch computes the mean between them, so that the offset
and the bytes equal the reference's on every device. The even and odd elements of a block are loaded
separately, so that packing two codes into a byte moves no data between threads. Dequantization to
16 bits reads eight codes per word and permutes bytes (``dequantize_triton``). For other dtypes and
sizes a kernel looks up the codes one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import FLOATS, check_device, check_dtype
from idefics2_kernels.gpu.launch_barrier import launch_barrier
from idefics2_kernels.gpu.primitives import LOWEST, cast
from idefics2_kernels.nf4 import nf4_weight as tables
from idefics2_kernels.nf4.dequantize_triton import code_values, decode
from idefics2_kernels.nf4.nf4_weight import NF4Weight

BLOCK = tl.constexpr(tables.BLOCK)
NESTED_BLOCK = tl.constexpr(tables.NESTED_BLOCK)
LAST_BIN = tl.constexpr(float(tables.BINS - 1))
# The least divisor, as in bitsandbytes. Its reciprocal is finite. The number is below the normal
# fp32 range, so Triton would make a plain constant a float64.
SMALLEST = tl.constexpr(1e-38)
# The shift from blocks to nested blocks. A division would also test the sign.
NESTED_SHIFT = tl.constexpr(tables.NESTED_BLOCK.bit_length() - 1)
# The shift from words of eight codes to blocks.
WORD_SHIFT = tl.constexpr((tables.BLOCK // 8).bit_length() - 1)
# Blocks of a program.
BLOCKS = 32
# A thread has four words of four different blocks. On an H200 28672 x 4096 takes 78 us with four
# words, 96 us with one, and 78 to 79 us with two or eight.
WORDS, TILES = 128, 4


@triton.jit
def load_absmax(
    absmax_ptr,  # (blocks,)
    nested_absmax_ptr,  # (ceil(blocks / 256),), if IS_NESTED
    nested_code_ptr,  # (256,), if IS_NESTED
    offset_ptr,  # (ceil(blocks / 256),), if IS_NESTED
    blocks,
    mask,
    IS_NESTED: tl.constexpr,
):
    """Return the fp32 absmax of ``blocks``, zero outside ``mask``."""
    absmax = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if IS_NESTED:
        nested = tl.load(nested_absmax_ptr + (blocks >> NESTED_SHIFT), mask=mask, other=0.0)
        offset = tl.load(offset_ptr + (blocks >> NESTED_SHIFT), mask=mask, other=0.0)
        code = tl.load(nested_code_ptr + absmax.to(tl.int32), mask=mask, other=0.0)
        # The maximum changes no value. It prevents the compiler from fusing product and sum, which
        # would round differently.
        absmax = tl.maximum(code * nested, LOWEST) + offset
        absmax = tl.where(mask, absmax, 0.0)
    return absmax


@triton.jit
def look_up(table, codes):
    """Return the entries of ``table`` (16,) at ``codes`` of any shape."""
    flat = tl.reshape(codes.to(tl.int32), [codes.numel])
    return tl.reshape(tl.gather(table, flat, 0), codes.shape)


@triton.jit
def unpack(table, packed):
    """Return the NF4 values of ``packed`` bytes (R, C), high nibble first: (R, 2 C) fp32."""
    pairs = tl.join(look_up(table, packed >> 4), look_up(table, packed & 15))
    return tl.reshape(pairs, [packed.shape[0], 2 * packed.shape[1]])


@triton.jit
def _nearest_code(scaled, bounds_ptr):
    code = tl.zeros(scaled.shape, tl.uint8)
    for i in tl.static_range(15):
        code += (scaled > tl.load(bounds_ptr + i)).to(tl.uint8)
    return code


@triton.jit
def _quantize_kernel(
    weight_ptr,  # (numel,)
    bounds_ptr,  # (15,)
    codes_ptr,  # (ceil(numel / 2),)
    absmax_ptr,  # (ceil(numel / 64),)
    numel,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = blocks[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]
    even = tl.load(weight_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
    odd = tl.load(weight_ptr + offs + 1, mask=offs + 1 < numel, other=0.0).to(tl.float32)

    absmax = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    is_full = (blocks + 1) * BLOCK <= numel
    divisor = tl.maximum(absmax, tl.full([BLOCKS], SMALLEST, tl.float32))
    reciprocal = tl.math.div_rn(1.0, divisor)[:, None]
    even = tl.where(is_full[:, None], even * reciprocal, tl.math.div_rn(even, divisor[:, None]))
    odd = tl.where(is_full[:, None], odd * reciprocal, tl.math.div_rn(odd, divisor[:, None]))

    packed = _nearest_code(even, bounds_ptr) << 4 | _nearest_code(odd, bounds_ptr)
    tl.store(codes_ptr + offs // 2, packed, mask=offs < numel)
    tl.store(absmax_ptr + blocks, tl.where(is_full, absmax, divisor), mask=blocks * BLOCK < numel)


@triton.jit
def _quantize_absmax_kernel(
    centered_ptr,  # (blocks,)
    bins_ptr,  # (65536,)
    absmax_ptr,  # (blocks,)
    nested_absmax_ptr,  # (ceil(blocks / 256),)
    blocks,
    NESTED_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * NESTED_BLOCK + tl.arange(0, NESTED_BLOCK)
    mask = offs < blocks
    centered = tl.load(centered_ptr + offs, mask=mask, other=0.0)
    absmax = tl.max(tl.abs(centered), axis=0)
    reciprocal = tl.math.div_rn(1.0, tl.where(absmax == 0.0, 1.0, absmax))
    scaled = tl.minimum(tl.maximum(centered * reciprocal, -1.0), 1.0)
    bins = ((scaled + 1.0) * 0.5 * LAST_BIN + 0.5).to(tl.int32)
    code = tl.load(bins_ptr + bins, mask=mask, other=0)
    tl.store(absmax_ptr + offs, tl.where(absmax == 0.0, 0, code), mask=mask)
    tl.store(nested_absmax_ptr + pid, absmax)


@triton.jit
def _dequantize_kernel(
    codes_ptr,  # (ceil(numel / 2),)
    absmax_ptr,  # (ceil(numel / 64),)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    table_ptr,  # (16,)
    out_ptr,  # (numel,)
    numel,
    IS_NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    table = tl.load(table_ptr + tl.arange(0, 16))
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        offset_ptr,
        blocks,
        blocks * BLOCK < numel,
        IS_NESTED,
    )
    offs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes_ptr + offs, mask=2 * offs < numel, other=0)
    values = unpack(table, packed) * absmax[:, None]
    offs = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offs, cast(values, out_ptr.dtype.element_ty), mask=offs < numel)


@triton.jit
def _dequantize_words_kernel(
    codes_ptr,  # (words,), eight codes each
    absmax_ptr,  # (ceil(words / 8),)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,  # (8 * words,)
    words,
    IS_NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * (TILES * WORDS)
    codes, absmaxes = tl.tuple(()), tl.tuple(())
    for tile in tl.static_range(TILES):
        word = first + tile * WORDS + tl.arange(0, WORDS)
        mask = word < words
        codes += (tl.load(codes_ptr + word, mask=mask, other=0),)
        absmaxes += (
            load_absmax(
                absmax_ptr,
                nested_absmax_ptr,
                nested_code_ptr,
                offset_ptr,
                word >> WORD_SHIFT,
                mask,
                IS_NESTED,
            ),
        )
    for tile in tl.static_range(TILES):
        lows, highs = code_values(absmaxes[tile], dtype)
        # The axes are (WORDS, code of a byte, byte, half of a word).
        values = decode(lows, highs, codes[tile], dtype)
        values = tl.reshape(tl.permute(values, (0, 3, 2, 1)), [WORDS, 8])
        word = first + tile * WORDS + tl.arange(0, WORDS)
        out_ptrs = out_ptr + word[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out_ptrs, values, mask=(word < words)[:, None])


def nf4_quantize(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """Quantize ``weight`` of any shape and strides in blocks of 64 elements, in row-major order.

    With ``double_quant`` the blocks' absmaxes are quantized too, in blocks of 256.

    Raises:
        ValueError: ``weight`` is on a device that runs no kernels.
        TypeError: ``weight`` is none of bf16, fp16, fp32.
    """
    check_dtype("weight", weight, *FLOATS)
    check_device(weight=weight)
    device, numel = weight.device, weight.numel()
    blocks = triton.cdiv(numel, tables.BLOCK)
    codes = torch.empty(triton.cdiv(numel, 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    if numel:
        _quantize_kernel[(triton.cdiv(blocks, BLOCKS),)](
            weight.contiguous(),
            tables.nf4_bounds(device),
            codes,
            absmax,
            numel,
            BLOCKS=BLOCKS,
            num_warps=4,
        )
    shape = tuple(weight.shape)
    if not double_quant:
        launch_barrier(device)
        return NF4Weight(codes, absmax, shape, weight.dtype)
    offset = absmax.mean()
    quantized = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested_blocks = triton.cdiv(blocks, tables.NESTED_BLOCK)
    nested_absmax = torch.empty(nested_blocks, dtype=torch.float32, device=device)
    if numel:
        _quantize_absmax_kernel[(nested_blocks,)](
            absmax - offset,
            tables.dynamic_bins(device),
            quantized,
            nested_absmax,
            blocks,
            NESTED_BLOCK=tables.NESTED_BLOCK,
            num_warps=4,
        )
    offsets = offset.repeat(nested_blocks)
    nested_code = tables.dynamic_code(device)
    launch_barrier(device)
    return NF4Weight(codes, quantized, shape, weight.dtype, offsets, nested_absmax, nested_code)


def nf4_dequantize(weight: NF4Weight) -> Tensor:
    """Dequantize ``weight`` to a tensor of its shape and dtype.

    Products are fp32, rounded once.

    Raises:
        ValueError: ``weight`` is on a device that runs no kernels.
    """
    check_device(weight=weight.codes)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if not out.numel():
        return out
    if _is_in_words(weight):
        words = out.numel() // 8
        _dequantize_words_kernel[(triton.cdiv(words, WORDS * TILES),)](
            weight.codes.view(torch.int32),
            *weight.absmax_parts,
            out,
            words,
            IS_NESTED=weight.is_nested,
            WORDS=WORDS,
            TILES=TILES,
            num_warps=WORDS // 32,
        )
    else:
        _dequantize_kernel[(triton.cdiv(weight.absmax.numel(), BLOCKS),)](
            weight.codes,
            *weight.absmax_parts,
            tables.nf4_code(weight.device),
            out,
            out.numel(),
            IS_NESTED=weight.is_nested,
            BLOCKS=BLOCKS,
            num_warps=4,
        )
    return out


def _is_in_words(weight: NF4Weight) -> bool:
    """Return whether codes can be read as words of eight, and weights have 16 bits."""
    return (
        weight.dtype.itemsize == 2
        and weight.numel % 8 == 0
        and weight.codes.storage_offset() % 4 == 0
    )
