"""NF4 products for few rows on Hopper, in Gluon.

It computes the same as the plain kernel of ``nf4_few_rows``. Codes are looked up in shared memory
(``dequantize_gluon``). Where x needs too much bandwidth of shared memory, half of the codes are
decoded by permuting bytes in registers.

A weight is decoded in the registers of the left operand of ``mma.sync``, 16 rows of the weight at a
time, and stays there. The order of the columns in a sum is free. Each of the four lanes that share
a row therefore decodes a block of 64 columns, with one absmax, of every 256. In shared memory, x is
ordered so that the columns of a lane's block are neighbors.

A program computes ``groups`` groups of rows along all of K, so nothing is summed through global
memory. Its warps are distributed over groups first, then along K. They wait for each other only if
x does not fit into shared memory as a whole. The partial sums of the warps along K are added in a
fixed order at the end.
"""

from dataclasses import asdict, dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from idefics2_kernels.gpu.dependent_launch import dependent_options
from idefics2_kernels.gpu.dependent_launch_gluon import gdc_launch_dependents, gdc_wait, prefetch
from idefics2_kernels.gpu.gluon_compat import reinterpret
from idefics2_kernels.gpu.target import H100_SMS
from idefics2_kernels.nf4.dequantize_gluon import (
    MEMORY,
    PLACES,
    TABLE_BYTES,
    append_stage,
    block_absmax,
    code_values,
    fill_table,
    left_operand,
    load_blocks,
    look_up_at,
    permute,
    warp_number,
)
from idefics2_kernels.nf4.nf4_weight import NF4Weight

# A block for each of the four lanes that share a row.
BLOCK_K = 256
# Bytes of shared memory for x, in addition to the table.
X_MEMORY = 128 * 1024
# A program with so many bytes of shared memory shares its SM with no other such program.
ALONE = 116 * 1024
MAX_M = 64
# With at least this many rows of the weight, it is worth reading all of x in every program.
WIDE = 128 * H100_SMS
# Turns whose codes are loaded or prefetched before the previous kernel ends: 64 to 128 KB per
# program.
PREFETCHED = gl.constexpr(4)
# Bytes of a page of shared memory. The nested codes fill one.
PAGE = 1024
PAGE_BYTES = gl.constexpr(PAGE)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes, the distribution of warps, and the buffers of x and codes."""

    # Rows of x in a tile.
    BLOCK_M: int
    # Rows of x in shared memory.
    X_ROWS: int
    # Rows of the weight per warp.
    ROWS: int
    WARPS_N: int
    WARPS_K: int
    # Turns of the loop for which a buffer holds x.
    TURNS: int
    # A single buffer holds all of x.
    BUFFERS: int
    # Turns for which codes are loaded ahead.
    DEPTH: int
    programs: int
    # Whether the upper eight of 16 rows are decoded by permuting bytes.
    PERMUTES: bool

    @property
    def pages(self) -> int:
        """The number of pages of shared memory: the table, nested codes, and x.

        They have at least ``ALONE`` bytes, so two programs do not fit on one SM. Otherwise some
        SMs would get two programs of a launch and others none, and the launch would take twice as
        long.
        """
        x = self.BUFFERS * self.TURNS * self.WARPS_K * self.X_ROWS * 2 * BLOCK_K
        return -(-max(MEMORY + PAGE + x, ALONE) // PAGE)

    @property
    def num_warps(self) -> int:
        """The number of warps of a program."""
        return self.WARPS_N * self.WARPS_K


def _x_rows(M: int) -> int:
    """Return the rows of x in shared memory. All lanes share a single row."""
    return 1 if M == 1 else max(8, int(triton.next_power_of_2(M)))


def complete_config(
    M: int, K: int, ROWS: int, WARPS_N: int, WARPS_K: int, DEPTH: int = 2, programs: int = H100_SMS
) -> LaunchConfig:
    """Return the launch options that follow from the distribution of rows and warps."""
    X_ROWS = _x_rows(M)
    turns = triton.next_power_of_2(triton.cdiv(K // BLOCK_K, WARPS_K))
    turn_bytes = 2 * X_ROWS * BLOCK_K * WARPS_K
    BUFFERS = 1 if turns * turn_bytes <= X_MEMORY else 2
    TURNS = turns if BUFFERS == 1 else X_MEMORY // 2 // turn_bytes
    # On an H100 4096 x 14336 takes 27 us for 16 rows, and 30 us by look-ups alone. If all of x is
    # in shared memory, look-ups alone are 0 to 20 % faster.
    PERMUTES = BUFFERS == 2 and X_ROWS == 16
    return LaunchConfig(
        max(8, X_ROWS), X_ROWS, ROWS, WARPS_N, WARPS_K, TURNS, BUFFERS, DEPTH, programs, PERMUTES
    )


def launch_config(M: int, N: int, K: int) -> LaunchConfig:
    """Return the launch options for ``M`` rows of x and a weight (``N``, ``K``)."""

    def program_rows(ROWS: int) -> int:
        return -(-N // (ROWS * H100_SMS)) * ROWS

    # A warp with 32 rows of the weight reads x half as often per row as one with 16, but a program
    # has only half as many groups of rows for its warps. 32 rows are chosen only if there are at
    # least five groups, so that ``WARPS_N`` is 8. Measured on an H100 with 16 rows of x: 28672 x
    # 4096 (32 rows) takes 38 us, 4096 x 14336 (16 rows) 27 us and 6144 x 4096 (16 rows) 13 us. With
    # the other number of rows they take 49, 38 and 16 us. Loading three turns ahead, or 16 warps,
    # was never faster.
    ROWS = 32 if program_rows(32) > 128 else 16
    WARPS_N = min(triton.next_power_of_2(program_rows(ROWS) // ROWS), 8)
    # The most warps along K for which one of two buffers holds x for at least one turn.
    most = X_MEMORY // 2 // (2 * _x_rows(M) * BLOCK_K)
    return complete_config(M, K, ROWS, WARPS_N, min(8 // WARPS_N, most))


@cache
def _layouts(config: LaunchConfig) -> dict[str, object]:
    """Return the layouts, with lanes and warps as in ``mma.sync`` and registers as loaded."""
    warps_n = [1 << i for i in range((config.WARPS_N - 1).bit_length())]
    warps_k = [1 << i for i in range((config.WARPS_K - 1).bit_length())]
    more_rows = [[0, 16 * config.WARPS_N, 0, 0]] if config.ROWS == 32 else []
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    codes = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 8, 0, 0], *more_rows],
        lane_bases=lanes,
        warp_bases=[*([0, 16 * w, 0, 0] for w in warps_n), *([w, 0, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, config.WARPS_N * config.ROWS, 4, 4],
    )
    half = gl.DistributedLinearLayout(
        reg_bases=[
            [0, 0, 0, 1],
            [0, 0, 0, 2],
            *([0, rows // 2, 0, 0] for _, rows, _, _ in more_rows),
        ],
        lane_bases=lanes,
        warp_bases=[*([0, 8 * w, 0, 0] for w in warps_n), *([w, 0, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, config.WARPS_N * config.ROWS // 2, 4, 4],
    )
    more_rows = [[0, 32 << i, 0] for i in range((config.BLOCK_M // 8 - 1).bit_length())]
    x = gl.DistributedLinearLayout(
        reg_bases=[*([0, 0, 1 << i] for i in range(5)), *more_rows],
        lane_bases=[[0, 1 << i, 0] for i in range(5)],
        warp_bases=[*([0, 0, 0] for _ in warps_n), *([w, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, config.BLOCK_M * 4, 32],
    )
    # A single row is loaded in a slice of the layout of (WARPS_K, BLOCK_M, 4, 32).
    if config.X_ROWS == 1:
        x = gl.DistributedLinearLayout(
            reg_bases=[[0, 0, 0, 1 << i] for i in range(5)],
            lane_bases=[
                *([0, 0, 1 << i, 0] for i in range(2)),
                *([0, 1 << i, 0, 0] for i in range(3)),
            ],
            warp_bases=[*([0, 0, 0, 0] for _ in warps_n), *([w, 0, 0, 0] for w in warps_k)],
            block_bases=[],
            shape=[config.WARPS_K, config.BLOCK_M, 4, 32],
        )
    product = gl.NVMMADistributedLayout(
        version=[2, 0],
        warps_per_cta=[config.WARPS_K, config.WARPS_N, 1],
        instr_shape=[1, 16, 8],
    )
    # A thread copies neighboring columns of a row of x.
    lines = min(config.X_ROWS * 4, 8)
    warps = min(config.X_ROWS * 4 // lines, config.num_warps)
    copy = gl.BlockedLayout(
        [1, 1, 8], [8 // lines, lines, 4], [config.num_warps // warps, warps, 1], [2, 1, 0]
    )
    return {"CODES": codes, "HALF": half, "X": x, "COPY": copy, "PRODUCT": product}


@gluon.jit
def _copy_x(
    x_ptr,
    smem,  # (TURNS * 2 * WARPS_K, X_ROWS * 4, 32)
    # The first turn of the buffer.
    start,
    stride_x,
    M,
    steps,
    WARPS_K: gl.constexpr,
    COPY: gl.constexpr,
    IS_EVEN: gl.constexpr,
):
    """Start copying the columns of x for a buffer's turns. Rows and columns past x are zeros."""
    PARTS: gl.constexpr = smem.shape[0]
    LINES: gl.constexpr = smem.shape[1]
    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, COPY)))[:, None, None]
    line = gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
    step = (start + part // (2 * WARPS_K)) * WARPS_K + part % WARPS_K
    # This tells the compiler that rows are aligned to 16 bytes.
    stride_x = stride_x // 8 * 8
    offs = gl.cast(line // 4, gl.int64) * stride_x + step * 256 + line % 4 * 64
    offs = offs + part // WARPS_K % 2 * 32 + column
    mask = (line // 4 < M) & (part >= 0) & (column >= 0)
    if not IS_EVEN:
        mask = mask & (step < steps)
    async_copy.async_copy_global_to_shared(smem, x_ptr + offs, mask)
    async_copy.commit_group()


@gluon.jit
def _blocks(place, flat, IS_ONE_ROUND: gl.constexpr, TILE: gl.constexpr):
    """Return the flat indices of a turn's blocks. Past the end the last ones are repeated."""
    row, k, q, first, N, steps, turns, rows = place
    round = 0
    if not IS_ONE_ROUND:
        round = flat // turns
    row = gl.minimum(first + gl.minimum(round * TILE + row, rows - 1), N - 1)
    step = gl.minimum((flat - round * turns) * k.shape[0] + k, steps - 1)
    return row * (steps * 4) + step * 4 + q


@gluon.jit
def _stage(
    weight,
    place,
    flat,
    CODES: gl.constexpr,
    IS_NESTED: gl.constexpr,
    IS_ONE_ROUND: gl.constexpr,
    TILE: gl.constexpr,
):
    """Start loading the codes and the absmax parts of a turn, which is counted over all rounds."""
    blocks = _blocks(place, flat, IS_ONE_ROUND, TILE)
    return load_blocks(weight, blocks, _is_odd(place), CODES, IS_NESTED)


@gluon.jit
def _is_odd(place):
    """Return for each word 1 if the lane's row is odd, else 0."""
    row, k, q, _first, _N, _steps, _turns, _rows = place
    return (row % 2 + k * 0 + q * 0)[:, :, :, None]


@gluon.jit
def _absmax(
    stage,
    table,
    is_there,
    IS_NESTED: gl.constexpr,
    IS_EVEN: gl.constexpr,
):
    """Return the absmax of a turn's blocks, equal to ``load_absmax``, or zero past the end."""
    absmax = block_absmax(stage, table + TABLE_BYTES, IS_NESTED)
    if not IS_EVEN:
        absmax = gl.where(is_there, absmax, 0.0)
    return absmax


@gluon.jit
def _halves(words, HALF: gl.constexpr):
    """Split ``words`` (WARPS_K, rows, 4, 4) into the lower and upper eight of each 16 rows."""
    parts = gl.reshape(words, [words.shape[0], words.shape[1] // 16, 2, 8, 4, 4])
    lower, upper = gl.split(gl.permute(parts, (0, 1, 3, 4, 5, 2)))
    shape: gl.constexpr = [words.shape[0], words.shape[1] // 2, 4, 4]
    lower, upper = gl.reshape(lower, shape), gl.reshape(upper, shape)
    return gl.convert_layout(lower, HALF), gl.convert_layout(upper, HALF)


@gluon.jit
def _halves_of_blocks(values, HALF: gl.constexpr):
    """Split ``values`` (WARPS_K, rows, 4), one per block, like ``_halves`` splits words."""
    parts = gl.reshape(values, [values.shape[0], values.shape[1] // 16, 2, 8, 4])
    lower, upper = gl.split(gl.permute(parts, (0, 1, 3, 4, 2)))
    shape: gl.constexpr = [values.shape[0], values.shape[1] // 2, 4]
    BLOCKS: gl.constexpr = gl.SliceLayout(3, HALF)
    lower = gl.convert_layout(gl.reshape(lower, shape), BLOCKS)
    upper = gl.convert_layout(gl.reshape(upper, shape), BLOCKS)
    return lower[:, :, :, None], upper[:, :, :, None]


@gluon.jit
def _x(smem, index, X: gl.constexpr, PRODUCT: gl.constexpr):
    """Return x as the product's right operand (WARPS_K, 128, BLOCK_M).

    Its columns have the order of those of ``left_operand``.
    """
    WARPS_K: gl.constexpr = smem.shape[1]
    BLOCK_M: gl.constexpr = 8 if smem.shape[2] == 4 else smem.shape[2] // 4
    # All lanes read the only row.
    if smem.shape[2] == 4:
        x = smem.index(index).load(gl.SliceLayout(1, X))[:, None, :, :]
        x = gl.broadcast(x, gl.full([WARPS_K, BLOCK_M, 4, 32], 0.0, x.dtype, X))[0]
    else:
        x = smem.index(index).load(X)
    x = gl.permute(gl.reshape(x, [WARPS_K, BLOCK_M, 4, 4, 2, 2, 2]), (0, 3, 4, 5, 2, 6, 1))
    x = gl.reshape(x, [WARPS_K, 128, BLOCK_M])
    return gl.convert_layout(x, gl.DotOperandLayout(1, PRODUCT, 2))


@gluon.jit
def _rows_of_tile(i, ROWS: gl.constexpr, WARPS_N: gl.constexpr):
    """Return the row of the weight, relative to the tile, of row ``i`` of the product.

    In the product's layout the second 16 rows of a warp follow the first 16 rows of all warps. In
    the weight all rows of a warp are neighbors.
    """
    return i // 16 % WARPS_N * ROWS + i // (16 * WARPS_N) * 16 + i % 16


@gluon.jit
def _store(
    acc,  # (WARPS_K, TILE, BLOCK_M)
    bias_ptr,
    out_ptr,
    # The first row of the tile, relative to the program.
    row,
    place,
    M,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    PRODUCT: gl.constexpr,
):
    """Add the sums of the warps along K, add the bias, and store."""
    _, _, _, first, N, _, _, rows = place
    out = gl.sum(acc, axis=0)
    OUT: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    i = gl.arange(0, out.shape[0], gl.SliceLayout(1, OUT))
    m = gl.arange(0, out.shape[1], gl.SliceLayout(0, OUT))
    row += _rows_of_tile(i, ROWS, out.shape[0] // ROWS)
    n = first + row
    mask_n = (row < rows) & (n < N)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + n, mask=mask_n, other=0.0)
        out += gl.cast(bias, gl.float32)[:, None]
    out_ptrs = out_ptr + gl.cast(m, gl.int64)[None, :] * N + n[:, None]
    out = gl.cast(out, out_ptr.dtype.element_ty)
    gl.store(out_ptrs, out, mask=mask_n[:, None] & (m < M)[None, :])


@gluon.jit(do_not_specialize=["stride_x", "M", "N", "steps", "groups"])
def _few_rows_hopper_kernel(
    x_ptr,  # (M, K)
    codes_ptr,  # (N * K / 8,), words of eight codes
    absmax_ptr,  # (N * K / 64,)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,  # (ceil(N * K / 64 / 256),)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (M, N), contiguous
    stride_x,
    M,
    N,
    # K / BLOCK_K.
    steps,
    # Groups of ROWS rows of a program.
    groups,
    IS_NESTED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_ONE_ROUND: gl.constexpr,
    # Whether all warps along K, and all buffers, have the same number of columns.
    IS_EVEN: gl.constexpr,
    IS_DEPENDENT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    X_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    TURNS: gl.constexpr,
    BUFFERS: gl.constexpr,
    DEPTH: gl.constexpr,
    PERMUTES: gl.constexpr,
    PAGES: gl.constexpr,
    CODES: gl.constexpr,
    HALF: gl.constexpr,
    X: gl.constexpr,
    COPY: gl.constexpr,
    PRODUCT: gl.constexpr,
):
    NUM_WARPS: gl.constexpr = WARPS_N * WARPS_K
    TILE: gl.constexpr = WARPS_N * ROWS
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: gl.constexpr = gl.SliceLayout(3, CODES)
    turns = gl.cdiv(steps, WARPS_K)
    rounds = gl.cdiv(groups, WARPS_N)
    chunks = gl.cdiv(turns, TURNS)

    # Triton places the largest allocation at the start of shared memory. This one begins with the
    # table, so the table's address is ``global_smem``. The compiler does not see that assembly
    # reads the table, so the allocation is kept alive to the end.
    smem = gl.allocate_shared_memory(
        gl.float32,
        [PAGES, PAGE_BYTES // 4],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
    )
    X_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0])
    x_smem = reinterpret(
        smem.index(TABLE_BYTES // PAGE_BYTES + 1),
        dtype,
        [BUFFERS, TURNS * 2 * WARPS_K, X_ROWS * 4, 32],
        X_LAYOUT,
    )
    x_turns = reinterpret(x_smem, dtype, [BUFFERS * TURNS * 2, WARPS_K, X_ROWS * 4, 32], X_LAYOUT)

    # The blocks of a turn are (WARPS_K, TILE, 4).
    k = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, BLOCKS)))[:, None, None]
    i = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))[None, :, None]
    q = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, BLOCKS)))[None, None, :]
    row = _rows_of_tile(i, ROWS, WARPS_N)
    first = gl.cast(gl.program_id(0), gl.int64) * groups * ROWS
    weight = codes_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr
    place = row, k, q, first, N, steps, turns, groups * ROWS

    gdc_launch_dependents(IS_DEPENDENT, steps)
    stages = append_stage((), _stage(weight, place, 0, CODES, IS_NESTED, IS_ONE_ROUND, TILE))
    for depth in gl.static_range(1, DEPTH):
        stages = append_stage(
            stages, _stage(weight, place, depth, CODES, IS_NESTED, IS_ONE_ROUND, TILE)
        )
    if IS_DEPENDENT:
        for ahead in gl.static_range(DEPTH, PREFETCHED):
            prefetch(codes_ptr + _blocks(place, ahead, IS_ONE_ROUND, TILE) * 8)
        prefetch(absmax_ptr + _blocks(place, DEPTH, IS_ONE_ROUND, TILE))
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    nested_code = gl.zeros([256], gl.float32, FLAT)
    if IS_NESTED:
        nested_code = gl.load(nested_code_ptr + gl.arange(0, 256, FLAT))
    fill_table(
        gl.inline_asm_elementwise(
            "mov.u32 $0, global_smem;", "=r,r", [steps], gl.int32, is_pure=True, pack=1
        ),
        NUM_WARPS,
    )
    gdc_wait(IS_DEPENDENT, steps)
    for i in gl.static_range(BUFFERS):
        _copy_x(x_ptr, x_smem.index(i), i * TURNS, stride_x, M, steps, WARPS_K, COPY, IS_EVEN)
    smem.index(TABLE_BYTES // PAGE_BYTES).store(nested_code)
    if BUFFERS == 1:
        async_copy.wait_group(0)
    # The assembly returns the address after the barrier, so no look-up can move before the barrier.
    table = gl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, global_smem;", "=r,r", [steps], gl.int32, is_pure=False, pack=1
    )
    lanes, _upper = _halves_of_blocks((row % 8 * 4 + q + k * 0) % PLACES * 8, HALF)
    absmax = _absmax(stages[0], table, k < steps, IS_NESTED, IS_EVEN)

    for round in range(rounds):
        acc = gl.zeros([WARPS_K, TILE, BLOCK_M], gl.float32, PRODUCT)
        is_idle = round * WARPS_N + warp_number(steps) % WARPS_N >= groups
        for chunk in range(chunks):
            start = chunk * TURNS
            buffer = 0
            if BUFFERS == 2:
                buffer = (round * chunks + chunk) % 2
                async_copy.wait_group(1)
            end = gl.where(is_idle, start, gl.minimum(start + TURNS, turns))
            for turn in range(start, end):
                flat = round * turns + turn
                stage = _stage(weight, place, flat + DEPTH, CODES, IS_NESTED, IS_ONE_ROUND, TILE)
                stages = append_stage(stages, stage)
                next = gl.where(turn + 1 < turns, turn + 1, 0) * WARPS_K + k
                lower_absmax, upper_absmax = _halves_of_blocks(absmax, HALF)
                if PERMUTES:
                    numbers = code_values(upper_absmax, dtype)
                absmax = _absmax(stages[1], table, next < steps, IS_NESTED, IS_EVEN)
                loaded, other = stages[0][0], stages[0][1]
                for part in gl.static_range(2):
                    words = gl.where(_is_odd(place) == part, loaded, other)
                    lower, upper = _halves(words, HALF)
                    lower = look_up_at(lower, lanes, lower_absmax, table, dtype)
                    if PERMUTES:
                        upper = permute(upper, numbers)
                    else:
                        upper = look_up_at(upper, lanes, upper_absmax, table, dtype)
                    right = _x(x_turns, (buffer * TURNS + turn - start) * 2 + part, X, PRODUCT)
                    acc = mma_v2(left_operand(lower, upper, dtype, PRODUCT), right, acc)
                stages = stages[1:]
            if BUFFERS == 2:
                # The next round starts again at the first columns. After the last round nothing is
                # read.
                is_wanted = round * chunks + chunk + 2 < rounds * chunks
                _copy_x(
                    x_ptr,
                    x_smem.index(buffer),
                    (chunk + 2) % chunks * TURNS,
                    stride_x,
                    gl.where(is_wanted, M, 0),
                    steps,
                    WARPS_K,
                    COPY,
                    IS_EVEN,
                )

        _store(acc, bias_ptr, out_ptr, round * TILE, place, M, HAS_BIAS, ROWS, PRODUCT)
    smem._keep_alive()


def supports(rows: Tensor, weight: NF4Weight) -> bool:
    """Return whether the kernel is used for this call, if the plain kernel supports the weight.

    It needs up to 64 rows, and alignment of codes and rows to 16 bytes. For more than 16 rows the
    weight must have ``WIDE`` rows, so that reading all of x in every program costs less than
    reading the weight.
    """
    return (
        0 < rows.shape[0] <= MAX_M
        and (rows.shape[0] <= 16 or weight.shape[0] >= WIDE)
        and rows.data_ptr() % 16 == 0
        and rows.stride(0) * rows.itemsize % 16 == 0
        and weight.codes.data_ptr() % 16 == 0
    )


def multiply(rows: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Compute ``nf4_few_rows.multiply`` for supported arguments.

    ``weight`` may have fewer rows than ``supports`` requires.
    """
    return launch(rows, weight, bias, launch_config(rows.shape[0], *weight.shape))


def launch(rows: Tensor, weight: NF4Weight, bias: Tensor | None, config: LaunchConfig) -> Tensor:
    """Multiply with the launch options ``config``."""
    (M, K), N = rows.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=rows.dtype, device=rows.device)
    groups = triton.cdiv(triton.cdiv(N, config.ROWS), config.programs)
    if out.numel():
        _few_rows_hopper_kernel[(triton.cdiv(N, groups * config.ROWS),)](
            rows,
            weight.codes.view(torch.int32),
            *weight.absmax_parts,
            bias,
            out,
            rows.stride(0),
            M,
            N,
            K // BLOCK_K,
            groups,
            IS_NESTED=weight.is_nested,
            HAS_BIAS=bias is not None,
            IS_ONE_ROUND=groups <= config.WARPS_N,
            IS_EVEN=K % (BLOCK_K * config.WARPS_K * config.TURNS) == 0,
            **dependent_options(),
            **{k: v for k, v in asdict(config).items() if k != "programs"},
            PAGES=config.pages,
            **_layouts(config),
            num_warps=config.num_warps,
            # A second program does not fit on the SM anyway. Without the option ptxas would spill
            # to leave registers for it.
            **({"maxnreg": 240} if config.BLOCK_M == 16 else {}),
        )
    return out
