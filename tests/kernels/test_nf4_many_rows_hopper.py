"""NF4's kernel for many rows on a CPU: its decoding bit by bit, its tiles, waits and writes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gluon_emulator import barriers
from gluon_emulator.loader import load_module
from guarded import guarded_allocations
from idefics2_kernels import NF4Weight
from idefics2_kernels.catalog.criterion import worst_error
from idefics2_kernels.nf4 import nf4_many_rows_hopper, nf4_matmul
from idefics2_kernels.nf4.nf4_weight import stack
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

pytestmark = pytest.mark.long

MODULES = "gpu.gluon_compat", "nf4.dequantize_gluon", "nf4.nf4_many_rows_hopper"


@pytest.fixture(scope="module")
def kernel() -> Any:
    return load_module(*MODULES)


def run(
    kernel: Any,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    programs: int = 2,
    **options: int,
) -> Tensor:
    """Run the kernel with a few programs, so that each has several tiles."""
    kernel.num_sms = lambda _device: programs
    config = {"BLOCK_M": 128, "STAGES": 3, "GROUP_M": 2} | options
    with guarded_allocations():
        out: Tensor = kernel.multiply(x, weight, bias, kernel.LaunchConfig(**config))
    return out


def random_weight(
    N: int,
    K: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    double_quant: bool = True,
    scale: float = 1.0,
) -> NF4Weight:
    return nf4_quantize((scale * torch.randn(N, K)).to(dtype), double_quant=double_quant)


def padded(x: Tensor) -> Tensor:
    """Put NaN between the rows of ``x`` and below them."""
    M, K = x.shape
    wide = torch.full((M + 3, K + 24), float("nan"), dtype=x.dtype)
    wide[:M, 8 : K + 8] = x
    return wide[:M, 8 : K + 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_kernel_dequantizes_bit_for_bit(
    double_quant: bool, dtype: torch.dtype, kernel: Any
) -> None:
    """Rows of the identity return the weights, with a block of zeros and a tiny one among them."""
    dense = torch.randn(200, 320).to(dtype)
    dense[5, 64:128] = 0
    dense[6] *= 1e-4
    weight = nf4_quantize(dense, double_quant=double_quant)
    codes = weight.codes.view(-1)
    assert {int(code) for code in codes >> 4} == {int(code) for code in codes & 15} == {*range(16)}
    stacked = stack([random_weight(256, 320, dtype, double_quant=double_quant), weight])
    for each in (weight, stacked):
        out = run(kernel, torch.eye(320).to(dtype), each)
        assert torch.equal(out, nf4_dequantize(each).t())


# M, N, K: parts of tiles, single rows, one step, and more steps than stages
SHAPES = [
    (1, 1, 64),
    (2, 7, 128),
    (65, 64, 192),
    (128, 128, 256),
    (129, 65, 64),
    (130, 129, 448),
    (257, 200, 128),
    (300, 264, 576),
]


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize(("block_m", "stages"), [(128, 2), (256, 3), (256, 4), (128, 5)])
def test_integers_are_exact(M: int, N: int, K: int, block_m: int, stages: int, kernel: Any) -> None:
    x = padded(torch.randint(-2, 3, (M, K)).bfloat16())
    dense = 2 * torch.randint(-1, 2, (N, K)).bfloat16()
    weight = nf4_quantize(dense, double_quant=False)
    bias = torch.randint(-9, 10, (N,)).bfloat16() if N % 2 else None
    out = run(kernel, x, weight, bias, BLOCK_M=block_m, STAGES=stages)
    exact = torch.nn.functional.linear(
        x.double(), nf4_dequantize(weight).double(), None if bias is None else bias.double()
    )
    assert out.shape == (M, N)
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32(dtype: torch.dtype, double_quant: bool, kernel: Any) -> None:
    x, weight = (
        torch.randn(140, 512).to(dtype),
        random_weight(136, 512, dtype, double_quant=double_quant),
    )
    bias = torch.randn(136).to(dtype)
    dense = nf4_dequantize(weight)
    exact = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    same = torch.nn.functional.linear(x, dense, bias)
    assert worst_error(run(kernel, x, weight, bias), same, exact) <= 1


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_result_does_not_depend_on_programs_and_order_of_tiles(
    group_m: int, programs: int, kernel: Any
) -> None:
    x, weight = torch.randint(-2, 3, (600, 128)).bfloat16(), random_weight(300, 128)
    whole = run(kernel, x, weight, programs=2)
    out = run(kernel, x, weight, programs=programs, GROUP_M=group_m)
    assert torch.equal(out, whole)
    exact = x.double() @ nf4_dequantize(weight).double().t()
    assert torch.equal(whole, exact.float().bfloat16())


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group_m"), [(5, 3, 2), (1, 7, 8), (8, 2, 8)])
def test_every_tile_is_visited_once(tiles_m: int, tiles_n: int, group_m: int, kernel: Any) -> None:
    tiles = [kernel.locate_tile(i, (tiles_m, tiles_n), group_m) for i in range(tiles_m * tiles_n)]
    assert {(int(m), int(n)) for m, n in tiles} == {
        (m, n) for m in range(tiles_m) for n in range(tiles_n)
    }
    # The first tiles have the same rows of the weight, and one tile of x after another
    assert [int(n) for _, n in tiles[: min(group_m, tiles_m)]] == [0] * min(group_m, tiles_m)


@pytest.mark.parametrize("M", [0, 3])
def test_empty_products(M: int, kernel: Any) -> None:
    N = 0 if M else 5
    assert run(kernel, torch.zeros(M, 64).half(), random_weight(N, 64, torch.half)).shape == (M, N)


def test_unsupported_inputs_are_refused() -> None:
    x, weight = torch.zeros(3, 128).half(), random_weight(5, 128, torch.half)
    assert nf4_many_rows_hopper.supports(x, weight)
    for bad_x, bad_weight, error, message in (
        (x.float(), random_weight(5, 128, torch.float32), TypeError, "got float32"),
        (x[:, :96], random_weight(5, 96, torch.half), ValueError, "multiple of 64, got"),
        (torch.zeros(500).half()[1:385].view(3, 128), weight, ValueError, "x must begin at"),
        (torch.zeros(3, 132).half()[:, :128], weight, ValueError, "x must have rows a multiple"),
        (x[:1].expand(3, 128), weight, ValueError, "x must have rows a multiple"),
    ):
        with pytest.raises(error, match=message):
            nf4_many_rows_hopper.multiply(bad_x, bad_weight, None)


@pytest.mark.parametrize(
    ("M", "N", "few", "many", "way"),
    [
        (1, 28672, 64, True, "few_rows"),
        (64, 28672, 64, True, "few_rows"),
        (64, 28672, 0, True, "fused"),
        (32, 4096, 32, True, "few_rows"),
        (33, 4096, 32, True, "fused"),
        (0, 4096, 0, True, "fused"),
        (65, 28672, 64, True, "many_rows"),
        (65, 28672, 64, False, "fused"),
        # There are 32 tiles for 132 programs
        (128, 4096, 32, True, "fused"),
        (65, 6144, 32, True, "many_rows"),
        # There are tiles for half of the programs, and the weight is small
        (256, 4096, 32, True, "dequantized"),
        (257, 4096, 32, True, "many_rows"),
        (512, 28672, 64, True, "many_rows"),
        (513, 28672, 64, True, "dequantized"),
        (129, 28672, 64, False, "dequantized"),
        (300, 128, 32, True, "dequantized"),
    ],
)
def test_choice_of_the_kernel(M: int, N: int, few: int, many: bool, way: str) -> None:
    assert nf4_matmul.choose(M, N, 132, few=few, many=many) == way


@pytest.mark.parametrize(
    ("M", "N", "block_m"),
    [
        (65, 28672, 128),
        # 224 tiles are two rounds, and 448 of half the size would be four
        (256, 28672, 256),
        (256, 4096, 128),
        (512, 4096, 128),
        (2048, 4096, 256),
        (2048, 6144, 256),
    ],
)
def test_choice_of_the_tile_size(M: int, N: int, block_m: int) -> None:
    assert block_m == nf4_many_rows_hopper.launch_config(M, N, 132).BLOCK_M


@pytest.mark.parametrize(
    ("block_m", "stages", "out_rows"), [(128, 6, 128), (256, 3, 128), (256, 4, 64)]
)
def test_output_rows_use_the_remaining_memory(block_m: int, stages: int, out_rows: int) -> None:
    config = nf4_many_rows_hopper.LaunchConfig(BLOCK_M=block_m, STAGES=stages, GROUP_M=8)
    assert config.out_rows == out_rows


# Changes to the source, each of which must be detected
MUTATIONS: dict[str, tuple[str, str]] = {
    "the low nibble first": ("* 16, high, low],", "* 16, low, high],"),
    "the second value first": ("${i}, g, f;", "${i}, f, g;"),
    "the first word's byte twice": ("${2 + i}, $4, $5", "$2, $4, $5"),
    "another thread's byte": ("place * 0x10 + 0x7604", "place * 0 + 0x7604"),
    "columns in another order": ("(0, 2, 4, 1, 3)", "(0, 4, 2, 1, 3)"),
    "absmax of the other warpgroup": (".store(value1)", ".store(value0)"),
    "absmax of the step before": ("gl.minimum(k + 1, blocks - 1)", "gl.minimum(k, blocks - 1)"),
    "absmax past the end": ("gl.minimum(k + 1, blocks - 1)", "k + 1"),
    "absmax of rows that are not there": ("row0 < N, row1 < N", "row0 >= 0, row1 >= 0"),
    "nested blocks of 128": ("blocks >> NESTED_SHIFT", "blocks >> NESTED_SHIFT - 1"),
    "no mean of the absmaxes": ("LOWEST) + offset", "LOWEST)"),
    "one mean for all tensors": ("offset_ptr + nested_blocks", "offset_ptr + 0 * nested_blocks"),
    "codes of the first warpgroup": ("(pid_n * CONSUMERS + c) * ROWS", "pid_n * CONSUMERS * ROWS"),
    "the same codes in every step": ("[row, k * WORDS]", "[row, 0]"),
    "the same columns of x in every step": ("k * BLOCK], full", "0], full"),
    "x of the first tile": ("[pid_m * BLOCK_M, k * BLOCK]", "[0, k * BLOCK]"),
    "a stage written while it is read": ("step // STAGES & 1 ^ 1)\n            mbarrier.expect", "1)\n            mbarrier.expect"),
    "absmax written while it is read": ("step // STAGES & 1 ^ 1)\n            absmax_smem", "1)\n            absmax_smem"),
    "half of x is waited for": ("BLOCK_M * BLOCK * 2 +", "BLOCK_M * BLOCK +"),
    "a stage given back before it is read": (
        "    acc, _, _, first, second = warpgroup_mma_wait(",
        "    mbarrier.arrive(empty.index(step % STAGES))\n    acc, _, _, first, second = warpgroup_mma_wait(",
    ),
    "no stage given back": ("    mbarrier.arrive(empty.index(step % STAGES))\n    return acc", "    return acc"),
    "even steps' weights for odd ones": ("_begin_step(odd, acc, smem, step + 1)", "_begin_step(even, acc, smem, step + 1)"),
    "the next tile's first step is not decoded": ("if step + 2 < count * steps:", "if step + 2 < steps:"),
    "one step too many": ("if step + 2 < count * steps:", "if step < count * steps:"),
    "the last step of an odd number": ("gl.cdiv(blocks, 2) * 2", "blocks // 2 * 2"),
    "a tile too few": ("gl.cdiv(tiles[0] * tiles[1] - gl.program_id(0),", "gl.cdiv(tiles[0] * tiles[1] - 1 - gl.program_id(0),"),
    "bias of the tile's first rows": ("rows = row + gl.arange", "rows = gl.arange"),
    "output of the other warpgroup": ("CONSUMER), pid_m * BLOCK_M, row)", "CONSUMER), pid_m * BLOCK_M, pid_n * 128)"),
    "output overwritten before it has left": (
        "tma.store_wait(0)\n        smem.permute",
        "smem.permute",
    ),
    "pieces of the output in another order": ("return first, second", "return second, first"),
    "pieces of the output in one place": ("row_x + i * OUT_M", "row_x"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barriers, "PATIENCE", 1.0)
    kernel = load_module(*MODULES, change=MUTATIONS[name])
    x, bias = torch.randn(270, 320).bfloat16(), 99 * torch.randn(306).bfloat16()
    weight = stack([random_weight(256, 320), random_weight(50, 320, scale=3.0)])
    dense = nf4_dequantize(weight)
    exact = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    same = torch.nn.functional.linear(x, dense, bias)
    try:
        out = run(kernel, x, weight, bias, BLOCK_M=256, STAGES=4)
    except (AssertionError, IndexError, ValueError):
        # The kernel waited forever, or read outside a tensor
        return
    assert not worst_error(out, same, exact) <= 1
