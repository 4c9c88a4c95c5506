"""NF4 products for one row of x on Hopper.

Each warp walks down the rows of the weight with its part of x in registers.

A row of K columns is treated as eight rows of K / 8 columns in the same memory, and so is x. Their
product is (8, 8 N). An output is the sum of the eight numbers whose rows of x and of the weight are
the same eighth. The tile of ``mma.sync`` has eight columns, of which one row of x would use only
one. With eighths all columns are used and x is eight times shorter. A warp therefore keeps its part
of x, 256 columns of each eighth, in registers, and only loads codes and absmaxes.

Codes are looked up in shared memory (``dequantize_gluon``): 128 accesses for 16 x 256 weights, and
16 accesses for their codes. Decoding half of them by permuting bytes halves the look-ups, but was
not faster. On an H100 28672 x 4096 takes 31 us. Reading the weight alone takes 26 us, and decoding
it from the L1 cache takes 25 us.

The sums of eighths, and of warps along K, are stored in shared memory and added in a fixed order at
the end.
"""

from dataclasses import asdict, dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from idefics2_kernels.gpu.dependent_launch import dependent_options
from idefics2_kernels.gpu.dependent_launch_gluon import gdc_launch_dependents, gdc_wait, prefetch
from idefics2_kernels.gpu.target import H100_SMS
from idefics2_kernels.nf4.dequantize_gluon import (
    PLACES,
    append_stage,
    block_absmax,
    fill_table,
    left_operand,
    load_blocks,
    look_up,
    warp_number,
)
from idefics2_kernels.nf4.nf4_weight import NF4Weight

EIGHTHS = gl.constexpr(8)
# Columns of a warp: a block for each of its 32 lanes.
COLUMNS = 2048
MAX_WARPS = 16
# Rounds whose codes are loaded or prefetched before the previous kernel ends.
PREFETCHED = gl.constexpr(4)
# Bytes of shared memory: the nested codes, the sums of warps, and the table. The table's address is
# a multiple of 64 KB, so that an address in it consists of two bytes of the base, a byte of codes
# and a lane's place. The total is so large that two programs do not fit on one SM. Otherwise some
# SMs would get two programs of a launch and others none.
MEMORY = 128 * 1024
NESTED_MEMORY = 1024
PARTS_MEMORY = 62 * 1024
SIZE = gl.constexpr(MEMORY)
NESTED_BYTES = gl.constexpr(NESTED_MEMORY)


@dataclass(frozen=True)
class LaunchConfig:
    """Warps along N, with two rows of the weight each, and along K.

    ``DEPTH`` is the number of rounds that are loaded ahead.
    """

    WARPS_N: int
    WARPS_K: int
    DEPTH: int
    programs: int

    @property
    def num_warps(self) -> int:
        """The number of warps of a program."""
        return self.WARPS_N * self.WARPS_K


def launch_config(N: int, K: int) -> LaunchConfig:
    """Return the launch options for one row of x and a weight (``N``, ``K``)."""
    WARPS_K = triton.next_power_of_2(K // COLUMNS)
    WARPS_N = max(8 // WARPS_K, 1)
    # The fewest waves of programs for which the sums of a program's rows fit into shared memory.
    waves = 1
    while (2 * pairs_per_program(N, waves * H100_SMS) + 2 * WARPS_N) * row_bytes(
        WARPS_K
    ) > PARTS_MEMORY:
        waves += 1
    return LaunchConfig(WARPS_N, WARPS_K, 2, waves * H100_SMS)


def row_bytes(WARPS_K: int) -> int:
    """Return the bytes of a row's sums, padded so that eight rows begin in different banks."""
    return WARPS_K * 8 * 4 + 16


def pairs_per_program(N: int, programs: int) -> int:
    """Return the number of pairs of rows of a program."""
    return -(-N // (2 * programs))


@cache
def _layouts(config: LaunchConfig) -> dict[str, object]:
    """Return the layouts, with lanes and warps as ``mma.sync`` distributes them."""
    warps_n = [1 << i for i in range((config.WARPS_N - 1).bit_length())]
    warps_k = [1 << i for i in range((config.WARPS_K - 1).bit_length())]
    # The axes are (warp along K, warp along N and eighth, block of four, word).
    codes = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2]],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        warp_bases=[*([0, 8 * w, 0, 0] for w in warps_n), *([w, 0, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, config.WARPS_N * 8, 4, 4],
    )
    x = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1 << i] for i in range(5)],
        lane_bases=[[0, 1 << i, 0] for i in range(5)],
        warp_bases=[*([0, 0, 0] for _ in warps_n), *([w, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, 32, 32],
    )
    sums = gl.DistributedLinearLayout(
        reg_bases=[[0, 8, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[*([0, 16 * w, 0] for w in warps_n), *([w, 0, 0] for w in warps_k)],
        block_bases=[],
        shape=[config.WARPS_K, config.WARPS_N * 16, 4],
    )
    product = gl.NVMMADistributedLayout(
        version=[2, 0],
        warps_per_cta=[config.WARPS_K, config.WARPS_N, 1],
        instr_shape=[1, 16, 8],
    )
    return {"CODES": codes, "X": x, "SUMS": sums, "PRODUCT": product}


# The PTX of the table's address: the first multiple of 64 KB after the sums.
_TABLE = gl.constexpr(
    f"mov.u32 $0, global_smem; add.u32 $0, $0, {NESTED_MEMORY + PARTS_MEMORY + 0xFFFF};"
    " and.b32 $0, $0, 0xFFFF0000;"
)


@gluon.jit
def _blocks(place, round, upper: gl.constexpr):
    """Return the flat indices of the blocks of a round's lower or upper rows.

    Past the end of rows or columns the last ones are repeated.
    """
    warp, eighth, k, q, first, pairs, N, steps, WARPS_N = place
    row = gl.minimum(first + gl.minimum(round * WARPS_N + warp, pairs - 1) * 2 + upper, N - 1)
    return ((row * EIGHTHS + eighth) * steps + gl.minimum(k, steps - 1)) * 4 + q


@gluon.jit
def _stage(weight, place, round, CODES: gl.constexpr, IS_NESTED: gl.constexpr):
    """Start loading the blocks of a round's lower rows and of its upper rows."""
    _warp, eighth, k, q, _first, _pairs, _N, _steps, _WARPS_N = place
    # ``_right`` loads x in the same order of halves.
    is_odd = (eighth % 2 + k * 0 + q * 0)[:, :, :, None]
    lower = load_blocks(weight, _blocks(place, round, 0), is_odd, CODES, IS_NESTED)
    return lower, load_blocks(weight, _blocks(place, round, 1), is_odd, CODES, IS_NESTED)


@gluon.jit
def _right(
    x_ptr, part: gl.constexpr, steps, WARPS_K: gl.constexpr, X: gl.constexpr, PRODUCT: gl.constexpr
):
    """Load x as the product's right operand (WARPS_K, 128, 8).

    Its columns have the order of those of ``left_operand``.
    """
    k = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    line = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
    k = gl.minimum(k, steps - 1)
    half = (part + line // 4) % 2
    offs = (line // 4 * steps + k) * 256 + line % 4 * 64 + half * 32 + column
    # A lane reads half a sector at a time, so the lines should stay in the L1 cache. Otherwise all
    # programs would wait for the same lines of the L2 cache.
    x = gl.load(x_ptr + offs, eviction_policy="evict_last")
    x = gl.permute(gl.reshape(x, [WARPS_K, 8, 4, 4, 2, 2, 2]), (0, 3, 4, 5, 2, 6, 1))
    return gl.convert_layout(gl.reshape(x, [WARPS_K, 128, 8]), gl.DotOperandLayout(1, PRODUCT, 2))


@gluon.jit
def _product(
    stage,
    nested_code,
    places,
    right,
    dtype: gl.constexpr,
    IS_NESTED: gl.constexpr,
    PRODUCT: gl.constexpr,
):
    """Return the product of a round's rows and x (WARPS_K, 16 WARPS_N, 8)."""
    lower, upper = stage
    lower_absmax = block_absmax(lower, nested_code, IS_NESTED)[:, :, :, None]
    upper_absmax = block_absmax(upper, nested_code, IS_NESTED)[:, :, :, None]
    shape: gl.constexpr = [lower[0].shape[0], lower[0].shape[1] * 2, 8]
    acc = gl.zeros(shape, gl.float32, PRODUCT)
    for part in gl.static_range(2):
        lower_pairs = look_up(lower[part], places, lower_absmax, dtype)
        upper_pairs = look_up(upper[part], places, upper_absmax, dtype)
        acc = mma_v2(left_operand(lower_pairs, upper_pairs, dtype, PRODUCT), right[part], acc)
    return acc


@gluon.jit
def _own_rounds(pairs, steps, WARPS_N: gl.constexpr):
    """Return the number of rounds of this warp, which is 0 if no columns are left for it."""
    warp = warp_number(steps)
    rounds = gl.cdiv(pairs - warp % WARPS_N, WARPS_N)
    return gl.where(warp // WARPS_N < steps, rounds, 0)


@gluon.jit
def _keep(acc, address, is_own, is_odd, SUMS: gl.constexpr):
    """Write the sums of matching eighths of ``acc`` (WARPS_K, 16 WARPS_N, 8) to shared memory."""
    even, odd = gl.split(gl.reshape(acc, [acc.shape[0], acc.shape[1], 4, 2]))
    even, odd = gl.convert_layout(even, SUMS), gl.convert_layout(odd, SUMS)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,f,r",
        [address, gl.where(is_odd, odd, even), gl.cast(is_own, gl.int32)],
        gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit(do_not_specialize=["N", "steps", "pairs"])
def _gemv_kernel(
    x_ptr,  # (K,)
    codes_ptr,  # (N * K / 8,), words of eight codes
    absmax_ptr,  # (N * K / 64,)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,  # (ceil(N * K / 64 / 256),)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (N,)
    N,
    # K / 2048.
    steps,
    # Pairs of rows of a program.
    pairs,
    IS_NESTED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_DEPENDENT: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    DEPTH: gl.constexpr,
    # Rows of a program, rounded up to a power of two.
    ROWS: gl.constexpr,
    CODES: gl.constexpr,
    X: gl.constexpr,
    SUMS: gl.constexpr,
    PRODUCT: gl.constexpr,
):
    NUM_WARPS: gl.constexpr = WARPS_N * WARPS_K
    ROW_BYTES: gl.constexpr = WARPS_K * 32 + 16
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: gl.constexpr = gl.SliceLayout(3, CODES)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.float32, [SIZE // NESTED_BYTES, NESTED_BYTES // 4], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )

    # The blocks of a round's lower rows, and of its upper rows, are (WARPS_K, 8 WARPS_N, 4).
    k = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, BLOCKS)))[:, None, None]
    i = gl.arange(0, WARPS_N * 8, gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))[None, :, None]
    q = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, BLOCKS)))[None, None, :]
    first = gl.program_id(0) * pairs * 2
    weight = codes_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr
    place = i // 8, i % 8, k, q, first, pairs, N, steps, WARPS_N

    gdc_launch_dependents(IS_DEPENDENT, steps)
    stages = append_stage((), _stage(weight, place, 0, CODES, IS_NESTED))
    for depth in gl.static_range(1, DEPTH):
        stages = append_stage(stages, _stage(weight, place, depth, CODES, IS_NESTED))
    if IS_DEPENDENT:
        for ahead in gl.static_range(DEPTH, PREFETCHED):
            prefetch(codes_ptr + _blocks(place, ahead, 0) * 8)
            prefetch(codes_ptr + _blocks(place, ahead, 1) * 8)
        prefetch(absmax_ptr + _blocks(place, DEPTH, 0))
    code = gl.zeros([256], gl.float32, FLAT)
    if IS_NESTED:
        code = gl.load(nested_code_ptr + gl.arange(0, 256, FLAT))
    fill_table(
        gl.inline_asm_elementwise(_TABLE, "=r,r", [steps], gl.int32, is_pure=True, pack=1),
        NUM_WARPS,
    )
    gdc_wait(IS_DEPENDENT, steps)
    right = (
        _right(x_ptr, 0, steps, WARPS_K, X, PRODUCT),
        _right(x_ptr, 1, steps, WARPS_K, X, PRODUCT),
    )
    smem.index(0).store(code)
    # The assembly returns the address after the barrier, so no read can move before the barrier.
    table = gl.inline_asm_elementwise(
        "bar.sync 0; " + _TABLE, "=r,r", [steps], gl.int32, is_pure=False, pack=1
    )
    places = table + ((i % 8 * 4 + q + k * 0) % PLACES * 8)[:, :, :, None]
    nested_code = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [table], gl.int32, is_pure=False, pack=1
    )
    parts = nested_code + NESTED_BYTES
    # The sums of a warp are (WARPS_K, 16 WARPS_N, 4), with two neighboring eighths in each.
    to_k = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    to_row = gl.arange(0, WARPS_N * 16, gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
    to_pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
    is_own = (to_row % 8 // 2 == to_pair) & (to_k >= 0)
    is_odd = (to_row % 2 == 1) & (to_pair >= 0) & (to_k >= 0)
    address = parts + to_row // 8 * ROW_BYTES + (to_k * 8 + to_row % 8) * 4 + to_pair * 0

    rounds = _own_rounds(pairs, steps, WARPS_N)
    for base in range(0, rounds, DEPTH):
        for turn in gl.static_range(DEPTH):
            stage = stages[0]
            next = _stage(weight, place, base + turn + DEPTH, CODES, IS_NESTED)
            stages = append_stage(stages[1:], next)
            if base + turn < rounds:
                acc = _product(stage, nested_code, places, right, dtype, IS_NESTED, PRODUCT)
                to = address + (base + turn) * (WARPS_N * 2 * ROW_BYTES)
                _keep(acc, to, is_own, is_odd, SUMS)

    row = gl.arange(0, ROWS, FLAT)
    parts = gl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, $1;", "=r,r", [parts], gl.int32, is_pure=False, pack=1
    )
    is_there = (row < pairs * 2) & (first + row < N)
    own = parts + gl.where(is_there, row, 0) * ROW_BYTES
    out = gl.zeros([ROWS], gl.float32, FLAT)
    for i in gl.static_range(WARPS_K * 2):
        a, b, c, d = gl.inline_asm_elementwise(
            "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,r",
            [own + i * 16],
            (gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=False,
            pack=1,
        )
        out += gl.where(i // 2 < steps, (a + b) + (c + d), 0.0)
    if HAS_BIAS:
        out += gl.cast(gl.load(bias_ptr + first + row, mask=is_there, other=0.0), gl.float32)
    gl.store(out_ptr + first + row, gl.cast(out, out_ptr.dtype.element_ty), mask=is_there)
    smem._keep_alive()


def supports(rows: Tensor, weight: NF4Weight) -> bool:
    """Return whether the kernel supports this call.

    It needs one row, K a multiple of the columns of a warp, and alignment to 16 bytes.
    """
    N, K = weight.shape
    return (
        rows.shape[0] == 1
        and K % COLUMNS == 0
        and 0 < K <= COLUMNS * MAX_WARPS
        # Indices of words have 32 bits.
        and N * K < 2**34
        and rows.data_ptr() % 16 == 0
        and weight.codes.data_ptr() % 16 == 0
    )


def multiply(rows: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Multiply supported ``rows`` (1, K) by ``weight`` (N, K) transposed: (1, N)."""
    return launch(rows, weight, bias, launch_config(*weight.shape))


def launch(rows: Tensor, weight: NF4Weight, bias: Tensor | None, config: LaunchConfig) -> Tensor:
    """Multiply with the launch options ``config``."""
    N, K = weight.shape
    out = torch.empty((1, N), dtype=rows.dtype, device=rows.device)
    pairs = pairs_per_program(N, config.programs)
    if out.numel():
        _gemv_kernel[(triton.cdiv(N, 2 * pairs),)](
            rows,
            weight.codes.view(torch.int32),
            *weight.absmax_parts,
            bias,
            out,
            N,
            K // COLUMNS,
            pairs,
            IS_NESTED=weight.is_nested,
            HAS_BIAS=bias is not None,
            **dependent_options(),
            **{name: value for name, value in asdict(config).items() if name != "programs"},
            ROWS=triton.next_power_of_2(max(2 * pairs, config.num_warps * 32)),
            **_layouts(config),
            num_warps=config.num_warps,
        )
    return out
