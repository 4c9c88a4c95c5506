"""The product x @ dequantized(weight).T + bias with the weight in NF4, for many rows on Hopper.

A tile is 128 rows of the weight by 128 or 256 rows of x. A step is 64 columns, which are a block of
each row of the weight. Two warpgroups compute 64 rows of the weight each. They decode the next
step's codes into registers, as the tensor cores' left operand, during the product of the current
step. Decoded weights are never in memory, and the tensor cores do not wait for them. One warp loads
x and codes by TMA, and another loads the absmax of each row to shared memory. A program computes
several tiles. Tiles of the same rows of the weight follow each other.

In the left operand's layout a thread has one pair of each eight columns. The pair is a byte of each
word of codes, always the same byte of a word. One instruction makes an address of that byte. The
rest is as in ``dequantize_gluon``: one instruction loads two values from the table, two multiply
them by the block's absmax, and one rounds both. The table needs so much shared memory that the
output of a tile of 256 rows is written in pieces.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from idefics2_kernels.gpu import primitives
from idefics2_kernels.gpu.gluon_compat import async_load, async_store, reinterpret
from idefics2_kernels.gpu.target import num_sms
from idefics2_kernels.nf4 import nf4_weight as tables
from idefics2_kernels.nf4.dequantize_gluon import MEMORY, PLACES, TABLE_BYTES, fill_table
from idefics2_kernels.nf4.nf4_weight import NF4Weight

BLOCK = gl.constexpr(tables.BLOCK)
LOWEST = gl.constexpr(primitives.LOWEST.value)
NESTED_SHIFT = gl.constexpr(tables.NESTED_BLOCK.bit_length() - 1)
# Words of eight codes in a step.
WORDS = gl.constexpr(tables.BLOCK // 8)
# Rows of the weight of a warpgroup.
ROWS = gl.constexpr(64)
# Warpgroups that compute.
CONSUMERS = gl.constexpr(2)
TILE_N = 128
# Bytes of shared memory, without the barriers.
SHARED_MEMORY = 226 * 1024
PAGE_BYTES = gl.constexpr(1024)
# Registers of a thread.
CONSUMER_REGISTERS = gl.constexpr(232)
LOADER_REGISTERS = gl.constexpr(48)

# The layouts of a warpgroup's codes and weights. Four threads share a row and read the same words
# of codes. Each thread has rows r and r + 8. The axes are row, place among the four, and step of
# the tensor cores (16 columns).
QUADS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [8, 0, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 4],
    )
)
CODE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 8],
    )
)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of x in a tile, steps in shared memory, and tiles of x that share weight rows."""

    BLOCK_M: int
    STAGES: int
    GROUP_M: int

    @property
    def out_rows(self) -> int:
        """The number of rows of x in a piece of the output, which must fit into shared memory."""
        stage = self.BLOCK_M * tables.BLOCK * 2 + TILE_N * (tables.BLOCK // 2 + 4)
        left = SHARED_MEMORY - MEMORY - self.STAGES * stage
        return next(rows for rows in (self.BLOCK_M, 128, 64) if rows * TILE_N * 2 <= left)


def launch_config(M: int, N: int, programs: int) -> LaunchConfig:
    """Return the launch options for ``M`` rows of x and ``programs`` that run at once."""
    # For 256 rows, a step takes 1024 cycles of the tensor cores. Decoding for two warpgroups takes
    # 270 cycles of each scheduler and 300 cycles of shared memory. The products use shared memory
    # for another 512 cycles, or 256 cycles for 128 rows.
    rounds = {rows: triton.cdiv(_tiles(M, N, rows), programs) for rows in (128, 256)}
    if 2 * rounds[128] < 3 * rounds[256]:
        return LaunchConfig(BLOCK_M=128, STAGES=6, GROUP_M=8)
    return LaunchConfig(BLOCK_M=256, STAGES=4, GROUP_M=8)


def _tiles(M: int, N: int, rows: int) -> int:
    return -(-M // rows) * -(-N // TILE_N)


def _decode_pairs(pair: str) -> str:
    """Return the PTX that decodes a byte of each of two words to a ``pair`` of weights.

    The byte becomes the second byte of an address. The lowest byte is the lane's place. ``mul.rn``
    is never fused.
    """
    return "".join(
        "{ .reg .b32 a; .reg .f32 f, g;"
        f" prmt.b32 a, ${2 + i}, $4, $5;"
        " add.u32 a, a, $6;"
        " ld.shared.v2.f32 {f, g}, [a];"
        " mul.rn.f32 f, f, $7;"
        " mul.rn.f32 g, g, $7;"
        f" cvt.rn.{pair}.f32 ${i}, g, f; }}\n"
        for i in range(2)
    )


_DECODE_BF16, _DECODE_FP16 = (gl.constexpr(_decode_pairs(pair)) for pair in ("bf16x2", "f16x2"))


@gluon.jit
def _unpack(pair, dtype: gl.constexpr):
    """Return the two numbers in an int32 on a new last axis."""
    # The assembly moves the whole register for two elements at a time. The compiler would not merge
    # separate halves into one register.
    both = gl.join(pair, pair)
    move: gl.constexpr = "mov.b32 $0, $1;"
    # The compiler does not accept a constexpr as the dtype.
    if dtype == gl.bfloat16:
        halves = gl.inline_asm_elementwise(
            move, "=r,r,r", [both], gl.bfloat16, is_pure=True, pack=2
        )
    else:
        halves = gl.inline_asm_elementwise(move, "=r,r,r", [both], gl.float16, is_pure=True, pack=2)
    return halves


@gluon.jit
def _table(steps):
    """Return the table's address, this thread's place and byte. ``steps`` may be any number."""
    # The assembly is not pure, so the compiler cannot move look-ups before the table is written.
    address = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [steps], gl.int32, is_pure=False, pack=1
    )
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, QUADS)))[:, None, None]
    place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, QUADS)))[None, :, None]
    lane = (row % 8 * 4 + place) % PLACES
    # The selector puts this thread's byte of a word above the lane's place.
    return address, lane * 8, place * 0x10 + 0x7604


@gluon.jit
def _decode(words_smem, absmax_smem, table, dtype: gl.constexpr):
    """Decode a step's weights to pairs, which equal the dequantized weights exactly.

    The first result is the pairs of the lower 8 of each 16 columns, the second those of the upper
    8. They stay packed between steps, because unpacked halves would be moved between registers.
    """
    absmax = absmax_smem.load(gl.SliceLayout(1, gl.SliceLayout(2, QUADS)))[:, None, None]
    even, odd = gl.split(gl.reshape(words_smem.load(CODE_WORDS), [ROWS, WORDS // 2, 2]))
    even = gl.convert_layout(even, gl.SliceLayout(1, QUADS))[:, None, :]
    odd = gl.convert_layout(odd, gl.SliceLayout(1, QUADS))[:, None, :]
    address, lane, selector = table
    asm: gl.constexpr = _DECODE_BF16 if dtype == gl.bfloat16 else _DECODE_FP16
    # The assembly reads shared memory, so it is not pure.
    return gl.inline_asm_elementwise(
        asm,
        "=&r,=&r,r,r,r,r,r,f",
        [even, odd, lane, selector, address, absmax],
        (gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _operand(pairs, A: gl.constexpr, dtype: gl.constexpr):
    """Return a step's weights (64, 64) as the product's left operand."""
    weight = gl.join(_unpack(pairs[0], dtype), _unpack(pairs[1], dtype))
    # The axes are (row, place, 16 columns, number of a pair, 8 columns).
    weight = gl.permute(weight, (0, 2, 4, 1, 3))
    return gl.convert_layout(gl.reshape(weight, [ROWS, BLOCK]), A)


@gluon.jit
def locate_tile(index, tiles, GROUP_M: gl.constexpr):
    """Return a tile's index among the tiles of x, and among those of the weight."""
    tiles_m, tiles_n = tiles
    group = index // (GROUP_M * tiles_n)
    index -= group * (GROUP_M * tiles_n)
    size = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + index % size, index // size


@gluon.jit
def _load(descs, smem, barriers, tiles, steps, GROUP_M: gl.constexpr):
    """Load x and codes to shared memory. Each load waits until its stage is free."""
    x_desc, words_desc = descs
    x_smem, words_smem, _, _ = smem
    full, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    # Steps that are finished, over all tiles.
    step = 0
    for index in range(gl.program_id(0), tiles[0] * tiles[1], gl.num_programs(0)):
        pid_m, pid_n = locate_tile(index, tiles, GROUP_M)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_M * BLOCK * 2 + CONSUMERS * ROWS * WORDS * 4)
            x = x_smem.index(stage)
            async_load(x_desc, [pid_m * BLOCK_M, k * BLOCK], full.index(stage), x)
            for c in gl.static_range(CONSUMERS):
                row = (pid_n * CONSUMERS + c) * ROWS
                words = words_smem.index(stage * CONSUMERS + c)
                async_load(words_desc, [row, k * WORDS], full.index(stage), words)
            step += 1


@gluon.jit
def _load_parts(absmax, blocks, mask):
    """Return the absmax, nested absmax and offset of ``blocks``."""
    absmax_ptr, nested_absmax_ptr, _, offset_ptr = absmax
    value = gl.load(absmax_ptr + blocks, mask=mask, other=0)
    nested, offset = value, value
    if nested_absmax_ptr is not None:
        nested_blocks = blocks >> NESTED_SHIFT
        nested = gl.load(nested_absmax_ptr + nested_blocks, mask=mask, other=0.0)
        offset = gl.load(offset_ptr + nested_blocks, mask=mask, other=0.0)
    return value, nested, offset


@gluon.jit
def _absmax(absmax, parts, mask):
    """Return the fp32 absmax, equal to ``nf4_quantize.load_absmax``, zero outside ``mask``."""
    _, nested_absmax_ptr, nested_code_ptr, _ = absmax
    value, nested, offset = parts
    if nested_absmax_ptr is not None:
        code = gl.load(nested_code_ptr + value.to(gl.int32))
        # The maximum changes no value. It prevents the compiler from fusing product and sum, which
        # would round differently.
        value = gl.maximum(code * nested, LOWEST) + offset
        value = gl.where(mask, value, 0.0)
    return value


@gluon.jit
def _load_absmax(absmax, smem, barriers, tiles, steps, sizes, GROUP_M: gl.constexpr):
    """Load the absmax of each row of the weight's tiles to shared memory, step by step."""
    _, _, absmax_smem, _ = smem
    full, empty = barriers
    STAGES: gl.constexpr = absmax_smem.shape[0] // CONSUMERS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    rows = gl.arange(0, ROWS, LAYOUT)
    N, blocks = sizes
    # Steps that are finished, over all tiles.
    step = 0
    for index in range(gl.program_id(0), tiles[0] * tiles[1], gl.num_programs(0)):
        _pid_m, pid_n = locate_tile(index, tiles, GROUP_M)
        row0 = pid_n * CONSUMERS * ROWS + rows
        row1 = row0 + ROWS
        mask0, mask1 = row0 < N, row1 < N
        blocks0, blocks1 = row0.to(gl.int64) * blocks, row1.to(gl.int64) * blocks
        parts0 = _load_parts(absmax, blocks0, mask0)
        parts1 = _load_parts(absmax, blocks1, mask1)
        for k in range(steps):
            value0, value1 = _absmax(absmax, parts0, mask0), _absmax(absmax, parts1, mask1)
            # The next step's parts are loaded during the wait for a stage. After the last block of
            # a row its parts are loaded again.
            after = gl.minimum(k + 1, blocks - 1)
            parts0 = _load_parts(absmax, blocks0 + after, mask0)
            parts1 = _load_parts(absmax, blocks1 + after, mask1)
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
            absmax_smem.index(stage * CONSUMERS).store(value0)
            absmax_smem.index(stage * CONSUMERS + 1).store(value1)
            mbarrier.arrive(full.index(stage))
            step += 1


@gluon.jit
def _begin_step(pairs, acc, smem, step):
    """Start the product of a step's weights and x, which is added to the accumulator."""
    x_smem, _words, _absmax, _out = smem
    STAGES: gl.constexpr = x_smem.shape[0]
    x = x_smem.index(step % STAGES).permute((1, 0))
    A: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return warpgroup_mma(_operand(pairs, A, x.dtype), x, acc, is_async=True)


@gluon.jit
def _decode_step(smem, table, barriers, step, CONSUMER: gl.constexpr):
    """Wait for a step's codes and decode its weights."""
    x_smem, words_smem, absmax_smem, _ = smem
    full = barriers[0]
    STAGES: gl.constexpr = x_smem.shape[0]
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    place = stage * CONSUMERS + CONSUMER
    pairs = _decode(words_smem.index(place), absmax_smem.index(place), table, x_smem.dtype)
    # This wait ends at once. Without it ptxas would move the decoding after the product.
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    return pairs


@gluon.jit
def _end_step(pairs, after, acc, barriers, step):
    """Wait for the product of a step and free its stage.

    The dependencies force the next step's weights to be decoded before the wait.
    """
    empty = barriers[1]
    STAGES: gl.constexpr = empty.shape[0]
    first, second = after
    acc, _, _, first, second = warpgroup_mma_wait(0, deps=(acc, pairs[0], pairs[1], first, second))
    mbarrier.arrive(empty.index(step % STAGES))
    return acc, (first, second)


@gluon.jit
def _halves(piece):
    """Split a piece of the output into halves with half as many rows of x."""
    halves = gl.permute(gl.reshape(piece, [ROWS, 2, piece.shape[1] // 2]), (0, 2, 1))
    first, second = gl.split(halves)
    return first, second


@gluon.jit
def _all_halves(pieces):
    """Split each piece of the output into halves."""
    halves = _halves(pieces[0])
    for i in gl.static_range(1, len(pieces)):
        halves = halves + _halves(pieces[i])
    return halves


@gluon.jit
def _store(out_desc, pieces, smem, row_x, row):
    """Store a tile of the output (64, BLOCK_M) in pieces that fit into its shared memory."""
    OUT_M: gl.constexpr = smem.shape[0]
    if pieces[0].shape[1] > OUT_M:
        pieces = _all_halves(pieces)
    if pieces[0].shape[1] > OUT_M:
        pieces = _all_halves(pieces)
    for i in gl.static_range(len(pieces)):
        # The previous piece must have left shared memory.
        tma.store_wait(0)
        smem.permute((1, 0)).store(pieces[i])
        fence_async_shared()
        async_store(out_desc, [row_x + i * OUT_M, row], smem)


@gluon.jit
def _multiply(
    out_desc,
    bias_ptr,
    smem,
    barriers,
    tiles,
    steps,
    N,
    GROUP_M: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Compute ``ROWS`` rows of the weight of each of this program's tiles."""
    x_smem, _words, _absmax, out_smem = smem
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    dtype: gl.constexpr = out_desc.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    count = gl.cdiv(tiles[0] * tiles[1] - gl.program_id(0), gl.num_programs(0))
    # Steps that are finished, over all tiles.
    step = 0
    table = _table(steps)
    even = _decode_step(smem, table, barriers, step, CONSUMER)
    odd = even
    for tile in range(count):
        pid_m, pid_n = locate_tile(gl.program_id(0) + tile * gl.num_programs(0), tiles, GROUP_M)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
        # The weights of even and odd steps have separate registers, so none are copied.
        for _pair in range(steps // 2):
            acc = _begin_step(even, acc, smem, step)
            # The condition is always true. Without it ptxas would move the rounding after the wait.
            if step + 1 < count * steps:
                odd = _decode_step(smem, table, barriers, step + 1, CONSUMER)
            acc, odd = _end_step(even, odd, acc, barriers, step)
            acc = _begin_step(odd, acc, smem, step + 1)
            # The next step belongs to this tile or to the next one.
            if step + 2 < count * steps:
                even = _decode_step(smem, table, barriers, step + 2, CONSUMER)
            acc, even = _end_step(odd, even, acc, barriers, step + 1)
            step += 2
        row = (pid_n * CONSUMERS + CONSUMER) * ROWS
        if bias_ptr is not None:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
            acc += gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)[:, None]
        _store(out_desc, (acc.to(dtype),), out_smem.index(CONSUMER), pid_m * BLOCK_M, row)
    tma.store_wait(0)


@gluon.jit
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """Return ``NUM`` barriers that complete with ``COUNT`` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["N", "blocks", "tiles_m", "tiles_n"])
def _many_rows_kernel(
    x_desc,  # (BLOCK_M, 64) tiles of x (M, K)
    words_desc,  # (64, 8) tiles of words of eight codes (N, K / 8)
    out_desc,  # (OUT_M, 64) tiles of out (M, N)
    absmax_ptr,  # (N * K / 64,)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,  # (ceil(N * K / 64 / 256),)
    bias_ptr,  # (N,)
    N,
    # Blocks of a row, K / 64.
    blocks,
    tiles_m,
    tiles_n,
    BLOCK_M: gl.constexpr,
    OUT_M: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    CODES: gl.constexpr = STAGES * CONSUMERS
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Triton places the largest allocation at the start of shared memory. This one begins with the
    # table, so the table's address is ``global_smem``. The compiler does not see that assembly
    # reads the table, so the allocation is kept alive to the end.
    TABLE_PAGES: gl.constexpr = TABLE_BYTES // PAGE_BYTES
    X_PAGES: gl.constexpr = STAGES * BLOCK_M * BLOCK * 2 // PAGE_BYTES
    pages = gl.allocate_shared_memory(gl.float32, [TABLE_PAGES + X_PAGES, PAGE_BYTES // 4], PLAIN)
    smem = (
        reinterpret(
            pages.index(TABLE_PAGES), x_desc.dtype, [STAGES, BLOCK_M, BLOCK], x_desc.layout
        ),
        gl.allocate_shared_memory(gl.int32, [CODES, ROWS, WORDS], words_desc.layout),
        gl.allocate_shared_memory(gl.float32, [CODES, ROWS], PLAIN),
        gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, OUT_M, ROWS], out_desc.layout),
    )
    address, _lane, _selector = _table(blocks)
    fill_table(address, 4)
    barriers = _barriers(STAGES, 2), _barriers(STAGES, CONSUMERS)
    fence_async_shared()
    absmax = absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr
    tiles = tiles_m, tiles_n
    # Steps are processed in pairs. Past the end of K all of x is zero.
    steps = gl.cdiv(blocks, 2) * 2
    # The consumers' arguments are repeated, because a constexpr that is assigned to a variable is
    # no longer one.
    gl.warp_specialize(
        [
            (_multiply, (out_desc, bias_ptr, smem, barriers, tiles, steps, N, GROUP_M, 0)),
            (_multiply, (out_desc, bias_ptr, smem, barriers, tiles, steps, N, GROUP_M, 1)),
            (_load, ((x_desc, words_desc), smem, barriers, tiles, steps, GROUP_M)),
            (_load_absmax, (absmax, smem, barriers, tiles, steps, (N, blocks), GROUP_M)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )
    pages._keep_alive()


def keeps_busy(M: int, N: int, programs: int) -> bool:
    """Return whether an output (M, N) has enough tiles for ``programs``. K is not divided.

    A third of ``programs`` is enough if N alone gives as many tiles. For more than 256 rows, half
    of ``programs`` is enough. Dequantizing a smaller weight costs less.
    """
    return 3 * _tiles(1, N, 128) >= programs or (M > 256 and 2 * _tiles(M, N, 128) >= programs)


def supports(rows: Tensor, weight: NF4Weight) -> bool:
    """Return whether the kernel can multiply ``rows`` (M, K) by ``weight`` (N, K)."""
    return _find_obstacle(rows, weight) is None


def _find_obstacle(rows: Tensor, weight: NF4Weight) -> Exception | None:
    """Return why the kernel cannot multiply ``rows`` (M, K) by ``weight`` (N, K), if it cannot."""
    if weight.dtype is torch.float32:
        return TypeError("weight must be bfloat16 or float16, got float32")
    if not weight.shape[1] or weight.shape[1] % tables.BLOCK:
        return ValueError(f"weight must have rows of a multiple of 64, got {weight.shape}")
    for name, part in {"x": rows, "codes": weight.codes}.items():
        if part.data_ptr() % 16:
            return ValueError(f"{name} must begin at a multiple of 16 bytes")
    if rows.shape[0] > 1 and (rows.stride(0) % 8 or rows.stride(0) < weight.shape[1]):
        return ValueError(f"x must have rows a multiple of 8 apart, got strides {rows.stride()}")
    return None


def multiply(
    rows: Tensor, weight: NF4Weight, bias: Tensor | None, config: LaunchConfig | None = None
) -> Tensor:
    """Multiply ``rows`` (M, K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (M, N).

    Raises:
        ValueError: The rows of ``weight`` are not a multiple of 64 long, or ``rows`` or the codes
            are not aligned for TMA.
        TypeError: ``weight`` is fp32.
    """
    if (obstacle := _find_obstacle(rows, weight)) is not None:
        raise obstacle
    (M, K), N = rows.shape, weight.shape[0]
    programs = num_sms(rows.device)
    if config is None:
        config = launch_config(M, N, programs)
    # TMA needs a row stride that is a multiple of 16 bytes. The columns past N are not written.
    out = torch.empty((M, triton.cdiv(N, 8) * 8), dtype=rows.dtype, device=rows.device)
    if not M or not N:
        return out[:, :N]
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    narrow = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=32, rank=2)
    words = weight.codes.view(torch.int32)
    x_stride = rows.stride(0) if M > 1 else K
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, TILE_N)
    _many_rows_kernel[(min(tiles_m * tiles_n, programs),)](
        TensorDescriptor(rows, [M, K], [x_stride, 1], [config.BLOCK_M, 64], wide),
        TensorDescriptor(words, [N, K // 8], [K // 8, 1], [64, 8], narrow),
        TensorDescriptor(out, [M, N], [out.stride(0), 1], [config.out_rows, 64], wide),
        *weight.absmax_parts,
        bias,
        N,
        K // tables.BLOCK,
        tiles_m,
        tiles_n,
        BLOCK_M=config.BLOCK_M,
        OUT_M=config.out_rows,
        STAGES=config.STAGES,
        GROUP_M=config.GROUP_M,
        num_warps=4,
        # At launch the two warpgroups and the loaders have a third of the registers each.
        # ``warp_specialize`` then redistributes them.
        maxnreg=168,
    )
    return out[:, :N].contiguous()
