"""NF4 codes to weights by permuting bytes, in plain Triton.

A block's codes can represent 16 numbers: the absmax times the value of a code, rounded to the
compute dtype. They are computed once and held as bytes in eight registers. ``permute_bytes`` then
looks up four codes at once. Low and high bytes are looked up separately, in the numbers of codes 0
to 7 and of codes 8 to 15. Each weight equals the dequantized one exactly and costs about 3
instructions.
"""

import triton
import triton.language as tl

from idefics2_kernels.gpu.primitives import UPCAST, cast
from idefics2_kernels.nf4 import nf4_weight as tables

CODE = tl.constexpr(tables.NF4_CODE)


@triton.jit
def permute_bytes(a, b, selector):
    """Return the four bytes of (``a``, ``b``) that the lowest four nibbles of ``selector`` select.

    All are int32. The lower three bits of a nibble select the byte, where 0 is the lowest byte of
    ``a``. If the highest bit of a nibble is set, the result is eight copies of that byte's highest
    bit.
    """
    # The interpreter does not support inline assembly.
    if UPCAST:
        result = (selector & 0) + (a & 0)
        for i in tl.static_range(4):
            nibble = selector >> 4 * i
            byte = tl.where(nibble & 4 != 0, b, a) >> 8 * (nibble & 3) & 0xFF
            byte = tl.where(nibble & 8 != 0, (byte >> 7) * 0xFF, byte)
            result |= byte << 8 * i
        return result
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pack(low, high, dtype: tl.constexpr):
    """Round two fp32 numbers to ``dtype`` and return both in an int32."""
    if UPCAST:
        low = cast(low, dtype).to(tl.uint16, bitcast=True).to(tl.int32)
        return low | cast(high, dtype).to(tl.uint16, bitcast=True).to(tl.int32) << 16
    convert: tl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return tl.inline_asm_elementwise(convert, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)


@triton.jit
def _unpack(pair, dtype: tl.constexpr):
    """Return the two numbers in an int32 on a new last axis."""
    if UPCAST:
        low, high = (pair & 0xFFFF).to(tl.uint16), (pair >> 16 & 0xFFFF).to(tl.uint16)
    # This needs no instruction. The compiler would not merge two shifted halves into one register.
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pair], (tl.uint16, tl.uint16), True, 1
        )
    return tl.join(low, high).to(dtype, bitcast=True)


@triton.jit
def _four_bytes(absmax, FIRST: tl.constexpr, dtype: tl.constexpr):
    """Return the low and the high bytes of the numbers of codes ``FIRST`` to ``FIRST + 3``."""
    a = _pack(absmax * CODE[FIRST], absmax * CODE[FIRST + 1], dtype)
    b = _pack(absmax * CODE[FIRST + 2], absmax * CODE[FIRST + 3], dtype)
    return permute_bytes(a, b, 0x6420), permute_bytes(a, b, 0x7531)


@triton.jit
def code_values(absmax, dtype: tl.constexpr):
    """Return the 16 numbers of a block's codes: four words of low bytes, four of high bytes."""
    low0, high0 = _four_bytes(absmax, 0, dtype)
    low4, high4 = _four_bytes(absmax, 4, dtype)
    low8, high8 = _four_bytes(absmax, 8, dtype)
    low12, high12 = _four_bytes(absmax, 12, dtype)
    return (low0, low4, low8, low12), (high0, high4, high8, high12)


@triton.jit
def _look_up(table, codes, is_upper):
    """Return a byte of ``table`` for the lower three bits of each of four nibbles.

    ``is_upper`` has a byte 0xFF for each code of 8 or more.
    """
    lower = permute_bytes(table[0], table[1], codes)
    upper = permute_bytes(table[2], table[3], codes)
    return upper & is_upper | lower & ~is_upper


@triton.jit
def _decode_four(lows, highs, codes, is_upper, dtype: tl.constexpr):
    """Return the weights of four codes: (..., 2 codes of a byte, 2 bytes).

    The first code of a byte is its high nibble.
    """
    low, high = _look_up(lows, codes, is_upper), _look_up(highs, codes, is_upper)
    first = _unpack(permute_bytes(low, high, 0x4051), dtype)
    return tl.join(first, _unpack(permute_bytes(low, high, 0x6273), dtype))


@triton.jit
def decode(lows, highs, words, dtype: tl.constexpr):
    """Return the weights of words of eight codes: (..., 2 codes of a byte, 2 bytes, 2 halves)."""
    codes = words & 0x77777777
    # The highest bits of the low nibbles become the highest bits of bytes.
    shifted = words << 4
    is_upper = permute_bytes(shifted, words, 0xD9C8)
    first = _decode_four(lows, highs, codes, is_upper, dtype)
    is_upper = permute_bytes(shifted, words, 0xFBEA)
    return tl.join(first, _decode_four(lows, highs, codes >> 16, is_upper, dtype))
