"""NF4 products for one row of x on Hopper.

Each warp goes down the weight with its part of x in registers.

A row of K columns is eight rows of K / 8 in the same memory, and so is x. The product of the two is
(8, 8 N), of which an output adds up eight numbers, those where row of x and row of the weight are
the same eighth. For ``mma.sync`` this is a product of eight columns as any other; the columns that
one row of x would leave empty make x eight times as short, so that a warp keeps the x it needs, 256
columns of each eighth, and loads nothing but codes and absmaxes as it goes.

Codes are looked up in shared memory (``dequantize_gluon``): 128 accesses for 16 x 256 weights, and
16 for their codes. Looking half of them up by permuting bytes in registers halves the look-ups, but
was no faster. 28672 x 4096 takes an H100 31 us; reading the weight alone 26, decoding it from the
L1 cache 25.

The eighths of a row, and the parts of warps along K, come to lie in shared memory, and are added in
a fixed order at the end.
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
COLUMNS = 2048  # of a warp: a block for each of its 32 lanes
MAX_WARPS = 16
# rounds whose codes are in registers or the L2 cache before the kernel ahead ends
PREFETCHED = gl.constexpr(4)
# Shared memory: what warps add up and the nested codes; then the table, at a multiple of 64 KB, so
# that an address of it is two bytes of the base, a byte of codes, and a lane's place. All in all so
# much that an SM has no room for a program of the next kernel as well: of one launch, two
# would then come to be on some SMs and none on others.
MEMORY = 128 * 1024
NESTED_MEMORY = 1024
PARTS_MEMORY = 62 * 1024
SIZE = gl.constexpr(MEMORY)
NESTED_BYTES = gl.constexpr(NESTED_MEMORY)


@dataclass(frozen=True)
class LaunchConfig:
    """How a product is cut: warps along N, 2 rows of the weight each, and along K.

    ``DEPTH`` counts the rounds that are being loaded.
    """

    WARPS_N: int
    WARPS_K: int
    DEPTH: int
    programs: int

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.WARPS_N * self.WARPS_K


def launch_config(N: int, K: int) -> LaunchConfig:
    """Return how a product of one row of x and a weight (``N``, ``K``) is cut."""
    WARPS_K = triton.next_power_of_2(K // COLUMNS)
    WARPS_N = max(8 // WARPS_K, 1)
    waves = 1  # of programs, whose rows fit into shared memory
    while (2 * pairs_per_program(N, waves * H100_SMS) + 2 * WARPS_N) * row_bytes(
        WARPS_K
    ) > PARTS_MEMORY:
        waves += 1
    return LaunchConfig(WARPS_N, WARPS_K, 2, waves * H100_SMS)


def row_bytes(WARPS_K: int) -> int:
    """Return what a row's parts take, so that eight neighboring rows' begin in different banks."""
    return WARPS_K * 8 * 4 + 16


def pairs_per_program(N: int, programs: int) -> int:
    """Return how many pairs of rows a program takes."""
    return -(-N // (2 * programs))


@cache
def _layouts(config: LaunchConfig) -> dict[str, object]:
    """Return who holds what: lanes and warps as ``mma.sync`` has them."""
    warps_n = [1 << i for i in range((config.WARPS_N - 1).bit_length())]
    warps_k = [1 << i for i in range((config.WARPS_K - 1).bit_length())]
    # (warp along K, warp along N and eighth, block of four, word)
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


# the first multiple of 64 KB behind the parts
_TABLE = gl.constexpr(
    f"mov.u32 $0, global_smem; add.u32 $0, $0, {NESTED_MEMORY + PARTS_MEMORY + 0xFFFF};"
    " and.b32 $0, $0, 0xFFFF0000;"
)


@gluon.jit
def _blocks(place, round, upper: gl.constexpr):
    """Return the flat blocks of a round's lower or upper rows.

    Past the end of rows or columns the last ones are repeated.
    """
    warp, eighth, k, q, first, pairs, N, steps, WARPS_N = place
    row = gl.minimum(first + gl.minimum(round * WARPS_N + warp, pairs - 1) * 2 + upper, N - 1)
    return ((row * EIGHTHS + eighth) * steps + gl.minimum(k, steps - 1)) * 4 + q


@gluon.jit
def _stage(weight, place, round, CODES: gl.constexpr, IS_NESTED: gl.constexpr):
    """Begin to load what a round needs, of its lower rows and of its upper ones."""
    _warp, eighth, k, q, _first, _pairs, _N, _steps, _WARPS_N = place
    is_odd = (eighth % 2 + k * 0 + q * 0)[:, :, :, None]  # so x is in that order
    lower = load_blocks(weight, _blocks(place, round, 0), is_odd, CODES, IS_NESTED)
    return lower, load_blocks(weight, _blocks(place, round, 1), is_odd, CODES, IS_NESTED)


@gluon.jit
def _right(
    x_ptr, part: gl.constexpr, steps, WARPS_K: gl.constexpr, X: gl.constexpr, PRODUCT: gl.constexpr
):
    """Load x as the product's right operand (WARPS_K, 128, 8).

    Its columns have the order of ``left_operand``'s.
    """
    k = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    line = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
    k = gl.minimum(k, steps - 1)
    half = (part + line // 4) % 2
    offs = (line // 4 * steps + k) * 256 + line % 4 * 64 + half * 32 + column
    # half a sector a lane at a time: past the L1 cache, all programs would wait for the same lines
    # of the L2 cache
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
    """Return how many rounds this warp has; none where there are no columns for it."""
    warp = warp_number(steps)
    rounds = gl.cdiv(pairs - warp % WARPS_N, WARPS_N)
    return gl.where(warp // WARPS_N < steps, rounds, 0)


@gluon.jit
def _keep(acc, address, is_own, is_odd, SUMS: gl.constexpr):
    """Write what is a row's own eighth, of acc (WARPS_K, 16 WARPS_N, 8), to shared memory."""
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
    codes_ptr,  # (N * K / 8,), eight codes each
    absmax_ptr,  # (N * K / 64,)
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,  # (ceil(N * K / 64 / 256),)
    bias_ptr,  # (N,), if HAS_BIAS
    out_ptr,  # (N,)
    N,
    steps,  # K / 2048
    pairs,  # of rows, of a program
    IS_NESTED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_DEPENDENT: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    DEPTH: gl.constexpr,
    ROWS: gl.constexpr,  # of a program, or more: a power of 2
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

    # blocks of a round's lower rows, and of its upper ones: (WARPS_K, 8 WARPS_N, 4)
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
    # addresses are not known before the barrier, so that nothing is read before it is there
    table = gl.inline_asm_elementwise(
        "bar.sync 0; " + _TABLE, "=r,r", [steps], gl.int32, is_pure=False, pack=1
    )
    places = table + ((i % 8 * 4 + q + k * 0) % PLACES * 8)[:, :, :, None]
    nested_code = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [table], gl.int32, is_pure=False, pack=1
    )
    parts = nested_code + NESTED_BYTES
    # what a warp adds up: (WARPS_K, 16 WARPS_N, 4), two of the last eighths each
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
    """Return whether the kernel is for such a call.

    It must be one row, of the columns of whole warps, aligned to 16 bytes.
    """
    N, K = weight.shape
    return (
        rows.shape[0] == 1
        and K % COLUMNS == 0
        and 0 < K <= COLUMNS * MAX_WARPS
        and N * K < 2**34  # words are counted in 32 bits
        and rows.data_ptr() % 16 == 0
        and weight.codes.data_ptr() % 16 == 0
    )


def multiply(rows: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Multiply supported ``rows`` (1, K) by ``weight`` (N, K) transposed: (1, N)."""
    return launch(rows, weight, bias, launch_config(*weight.shape))


def launch(rows: Tensor, weight: NF4Weight, bias: Tensor | None, config: LaunchConfig) -> Tensor:
    """Multiply, cut as ``config`` says."""
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
