"""Two exact and fast methods to decode NF4 weights, for kernels in Gluon.

The first method uses a table in shared memory. It has an entry for each byte of codes: the fp32
values of its two nibbles. An entry has 16 copies in different banks, for the lanes of half a warp,
which shared memory serves together. An entry begins at a multiple of 256 bytes, half of which are
unused. For two weights, one instruction makes an address, one loads two values, two multiply them
by the block's absmax, and one rounds both: 2.5 instructions per weight. The limit is the bandwidth
of shared memory.

The second method permutes bytes in registers (see ``dequantize_triton``): 3 instructions per
weight, all on the integer units. The 16 numbers of a block are computed once, rounded and held as
bytes, and four codes are looked up at once.

A kernel that decodes eight of sixteen rows by each method uses both units. ``table`` and ``places``
are addresses in shared memory.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from idefics2_kernels.gpu.primitives import LOWEST
from idefics2_kernels.nf4 import nf4_weight as tables
from idefics2_kernels.nf4.nf4_quantize import NESTED_SHIFT

# Bytes of the table.
MEMORY = 256 * 256
TABLE_BYTES = gl.constexpr(MEMORY)
# Copies of an entry. The two halves of a warp read one after the other.
PLACES = gl.constexpr(16)
_CODE = gl.constexpr(tables.NF4_CODE)
_LOWEST = gl.constexpr(LOWEST.value)
_NESTED_SHIFT = gl.constexpr(NESTED_SHIFT.value)


def _look_up_ptx(pair: str, base: str = "") -> str:
    """Return the PTX that decodes a word to four ``pair``s by the table.

    The operands are a word, a place in the table and an absmax. A byte of codes becomes the second
    byte of the place, and ``base`` is added. ``mul.rn`` is never fused.
    """
    add = f" add.u32 a, a, {base};" if base else ""
    return "".join(
        "{ .reg .b32 a; .reg .f32 e, f;"
        f" prmt.b32 a, $4, $5, 0x76{i}4;{add}"
        " ld.shared.v2.f32 {e, f}, [a];"
        " mul.rn.f32 e, e, $6;"
        " mul.rn.f32 f, f, $6;"
        f" cvt.rn.{pair}.f32 ${i}, f, e; }}\n"
        for i in range(4)
    )


def _code_values_ptx(pair: str) -> str:
    """Return the PTX that computes the 16 numbers of a block's codes from its absmax.

    Four words hold their low bytes, four their high bytes.
    """
    text = ""
    for i in range(4):
        text += "{ .reg .f32 a, b, c, d; .reg .b32 p, q;"
        for name, value in zip("abcd", tables.NF4_CODE[4 * i : 4 * i + 4], strict=True):
            text += f" mul.rn.f32 {name}, $8, 0f{struct.pack('>f', value).hex()};"
        text += f" cvt.rn.{pair}.f32 p, b, a; cvt.rn.{pair}.f32 q, d, c;"
        text += f" prmt.b32 ${i}, p, q, 0x6420; prmt.b32 ${i + 4}, p, q, 0x7531; }}\n"
    return text


def _permute_ptx() -> str:
    """Return the PTX that decodes a word to four pairs by the words of ``_code_values_ptx``.

    Register ``m`` has a byte 0xFF for each code of 8 or more.
    """
    text = (
        "{ .reg .b32 c, s, m, t, u, l, h; and.b32 c, $4, 0x77777777; shl.b32 s, $4, 4;"
        " prmt.b32 m, s, $4, 0xD9C8;"
    )
    for i in range(2):
        for name, first in ("l", 5), ("h", 9):
            text += f" prmt.b32 t, ${first}, ${first + 1}, c; prmt.b32 u, ${first + 2}, ${first + 3}, c;"
            text += f" lop3.b32 {name}, m, u, t, 0xCA;"
        text += f" prmt.b32 ${2 * i}, l, h, 0x4051; prmt.b32 ${2 * i + 1}, l, h, 0x6273;"
        if i == 0:
            text += " shr.u32 c, c, 16; prmt.b32 m, s, $4, 0xFBEA;\n"
    return text + " }"


_LOOK_UP_BF16, _LOOK_UP_FP16 = (gl.constexpr(_look_up_ptx(pair)) for pair in ("bf16x2", "f16x2"))
_LOOK_UP_AT_BF16, _LOOK_UP_AT_FP16 = (
    gl.constexpr(_look_up_ptx(pair, "$7")) for pair in ("bf16x2", "f16x2")
)
_CODE_VALUES_BF16, _CODE_VALUES_FP16 = (
    gl.constexpr(_code_values_ptx(pair)) for pair in ("bf16x2", "f16x2")
)
_PERMUTE = gl.constexpr(_permute_ptx())


@gluon.jit
def _value(code, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Return the values of the codes ``FIRST`` + ``code``, without reading memory.

    ``code`` must be less than ``COUNT``.
    """
    value = gl.where(code == 0, _CODE[FIRST], 0.0)
    for i in gl.static_range(1, COUNT):
        value = gl.where(code == i, _CODE[FIRST + i], value)
    return value


@gluon.jit
def fill_table(table, NUM_WARPS: gl.constexpr):
    """Write the two values of every byte to each place, the value of the high nibble first.

    A thread writes 16 bytes for two places at once.
    """
    LANES: gl.constexpr = PLACES // 2
    # Bytes of codes that are written at once, and the numbers of low and high nibbles among them.
    AT_ONCE: gl.constexpr = NUM_WARPS * 32 // LANES
    LOWS: gl.constexpr = 16 if AT_ONCE > 16 else AT_ONCE
    HIGHS: gl.constexpr = AT_ONCE // LOWS
    thread = gl.arange(0, NUM_WARPS * 32, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    byte = thread // LANES
    for i in gl.static_range(256 // AT_ONCE):
        low = _value(byte % LOWS, i * AT_ONCE % 16, LOWS)
        high = _value(byte // LOWS, i * AT_ONCE // 16, HIGHS)
        gl.inline_asm_elementwise(
            "st.shared.v4.f32 [$1], {$2, $3, $2, $3}; mov.u32 $0, 0;",
            "=r,r,f,f",
            [table + (byte + i * AT_ONCE) * 256 + thread % LANES * 16, high, low],
            gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def warp_number(anything):
    """Return the number of this warp, for which Gluon has no function."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x; shr.u32 $0, $0, 5;",
        "=&r,r",
        [anything],
        gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def append_stage(stages, stage):
    """Return ``stages`` with ``stage`` appended."""
    stages += (stage,)
    return stages


@gluon.jit
def load_blocks(weight, blocks, is_odd, CODES: gl.constexpr, IS_NESTED: gl.constexpr):
    """Start loading the codes and the absmax parts of ``blocks`` (WARPS_K, rows, 4).

    The codes are loaded in two halves of a block. Lanes of odd rows, where ``is_odd`` (WARPS_K,
    rows, 4, 1) is 1, load the second half first. Eight lanes load 16 bytes each at once, and this
    order keeps them in different banks of the L1 cache.
    """
    codes_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr = weight
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, CODES))))[
        None, None, None, :
    ]
    words_ptrs = codes_ptr + (blocks * 8)[:, :, :, None] + word
    absmax = gl.load(absmax_ptr + blocks)
    nested, offset = absmax, absmax
    if IS_NESTED:
        nested = gl.load(nested_absmax_ptr + (blocks >> _NESTED_SHIFT))
        offset = gl.load(offset_ptr + (blocks >> _NESTED_SHIFT))
    other = is_odd * 4
    return gl.load(words_ptrs + other), gl.load(words_ptrs + (4 - other)), absmax, nested, offset


@gluon.jit
def block_absmax(stage, nested_code, IS_NESTED: gl.constexpr):
    """Return the absmax of the blocks of ``load_blocks``, equal to ``nf4_quantize.load_absmax``.

    ``nested_code`` is an address in shared memory.
    """
    absmax = stage[2]
    if IS_NESTED:
        code = gl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];",
            "=f,r",
            [nested_code + gl.cast(absmax, gl.int32) * 4],
            gl.float32,
            is_pure=False,
            pack=1,
        )
        # The maximum changes no value. It prevents the compiler from fusing product and sum, which
        # would round differently.
        absmax = gl.maximum(code * stage[3], _LOWEST) + stage[4]
    return absmax


@gluon.jit
def look_up(words, places, absmax, dtype: gl.constexpr):
    """Decode each word to four pairs of weights by the table."""
    asm: gl.constexpr = _LOOK_UP_BF16 if dtype == gl.bfloat16 else _LOOK_UP_FP16
    # The assembly reads shared memory, so it is not pure.
    return gl.inline_asm_elementwise(
        asm,
        "=&r,=&r,=&r,=&r,r,r,f",
        [words, places, absmax],
        (gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def look_up_at(words, places, absmax, base, dtype: gl.constexpr):
    """Decode like ``look_up``, with ``places`` relative to the table's address ``base``."""
    asm: gl.constexpr = _LOOK_UP_AT_BF16 if dtype == gl.bfloat16 else _LOOK_UP_AT_FP16
    return gl.inline_asm_elementwise(
        asm,
        "=&r,=&r,=&r,=&r,r,r,f,r",
        [words, places, absmax, base],
        (gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def code_values(absmax, dtype: gl.constexpr):
    """Return the bytes of the 16 numbers of a block's codes."""
    asm: gl.constexpr = _CODE_VALUES_BF16 if dtype == gl.bfloat16 else _CODE_VALUES_FP16
    return gl.inline_asm_elementwise(
        asm,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f",
        [absmax],
        (gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def permute(words, numbers):
    """Decode each word to four pairs of weights by the ``numbers`` of ``code_values``."""
    l0, l1, l2, l3, h0, h1, h2, h3 = numbers
    return gl.inline_asm_elementwise(
        _PERMUTE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [words, l0, l1, l2, l3, h0, h1, h2, h3],
        (gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _join_pairs(pairs):
    """Join the four pairs of each word: (..., byte of a half, half of a word)."""
    return gl.join(gl.join(pairs[0], pairs[1]), gl.join(pairs[2], pairs[3]))


@gluon.jit
def left_operand(lower, upper, dtype: gl.constexpr, PRODUCT: gl.constexpr):
    """Return both rows' weights as the product's left operand (WARPS_K, 16 WARPS_N, 128)."""
    pairs = gl.join(_join_pairs(lower), _join_pairs(upper))
    WARPS_K: gl.constexpr = pairs.shape[0]
    WARPS_N: gl.constexpr = pairs.shape[1] // 8
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (gl.uint16, gl.uint16), True, 1
    )
    weight = gl.join(low, high).to(dtype, bitcast=True)
    # The permutation orders the columns by word, half of a word, byte, block, code of a byte.
    weight = gl.reshape(weight, [WARPS_K, WARPS_N, 8, 4, 4, 2, 2, 2, 2])
    weight = gl.permute(weight, (0, 1, 7, 2, 4, 6, 5, 3, 8))
    weight = gl.reshape(weight, [WARPS_K, WARPS_N * 16, 128])
    return gl.convert_layout(weight, gl.DotOperandLayout(0, PRODUCT, 2))
