"""NF4's kernel for few rows in Gluon on a CPU: every weight bit for bit, its reads and its sums."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gluon_emulator.loader import load_module
from guarded import guarded_allocations
from idefics2_kernels.nf4 import nf4_few_rows_hopper
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize
from nf4_product import DTYPES, Product, expected, is_noticed

pytestmark = pytest.mark.long

MODULES = (
    "gpu.gluon_compat",
    "gpu.dependent_launch_gluon",
    "nf4.dequantize_gluon",
    "nf4.nf4_few_rows_hopper",
)


@pytest.fixture(scope="module")
def kernel() -> Any:
    return load_module(*MODULES)


@dataclass(frozen=True, kw_only=True)
class Cut(Product):
    """A product and its division among warps.

    The kernel chooses the division, unless ``rows`` gives the rows of a warp.
    """

    rows: int = 0
    warps_n: int = 1
    warps_k: int = 1
    depth: int = 2
    programs: int = 2
    x_memory: int = 2**17

    def run(self, kernel: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
        with monkeypatch.context() as patch, guarded_allocations():
            patch.setattr(kernel, "X_MEMORY", self.x_memory)
            if self.rows:
                cut = self.rows, self.warps_n, self.warps_k, self.depth, self.programs
                patch.setattr(
                    kernel, "launch_config", lambda M, _N, K: kernel.complete_config(M, K, *cut)
                )
            out: Tensor = kernel.multiply(**inputs)
            return out


@pytest.mark.parametrize(("dtype", "double_quant"), [*product(DTYPES, (True, False))])
def test_every_weight_bit_for_bit(
    dtype: torch.dtype, double_quant: bool, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the identity return the weights one by one.

    The absmaxes span the range of the dtype.
    """
    cut = Cut(64, 70, 512, double_quant=double_quant, dtype=dtype)
    scales = torch.logspace(-6, 3, 70)[:, None]
    weight = nf4_quantize((torch.randn(70, 512) * scales).to(dtype), double_quant=double_quant)
    wanted = nf4_dequantize(weight).t()
    eye = torch.eye(512, dtype=dtype)
    for rows, columns in zip(eye.split(64), wanted.split(64), strict=True):
        out = cut.run(kernel, {"rows": rows, "weight": weight, "bias": None}, monkeypatch)
        assert torch.equal(out, columns)


CUTS: dict[str, Cut] = {
    # The kernel chooses the division
    "one-row": Cut(1, 33, 512),
    "one-row-long": Cut(1, 70, 3328, double_quant=False),
    "few-rows": Cut(7, 40, 2048, bias=False),
    "two-columns-of-tiles": Cut(16, 300, 256, dtype=torch.float16),
    "seventeen-rows": Cut(17, 33, 4096),
    "most-rows": Cut(64, 71, 1024, double_quant=False, dtype=torch.float16),
    "many-programs": Cut(1, 5000, 256, bias=False),
    "one-weight-row": Cut(5, 1, 256),
    # Each program has 64 rows
    "both-halves": Cut(12, 8448, 256),
    # There are more groups of rows than warps, so there are several rounds
    "rounds": Cut(3, 200, 512, rows=16, warps_n=2),
    "rounds-of-one": Cut(9, 150, 768, rows=32, warps_n=1),
    "rounds-split": Cut(1, 300, 1792, rows=16, warps_n=2, warps_k=4),
    "rounds-all-along-k": Cut(16, 200, 4096, rows=32, warps_k=8),
    # One warp has no group of rows, or no columns
    "idle-warp": Cut(8, 90, 512, rows=16, warps_n=4),
    "uneven-columns": Cut(16, 65, 1280, rows=32, warps_k=4),
    "fewer-columns": Cut(2, 20, 512, rows=16, warps_k=8),
    # Products with infinite weights. A zero must be added directly, not as a product with zero.
    "infinite": Cut(
        4, 40, 1280, rows=16, warps_k=4, double_quant=False, dtype=torch.float16, absmax=1e6
    ),
    # x is in two buffers
    "buffers": Cut(16, 70, 1536, rows=32, warps_n=2, x_memory=2**15),
    "buffers-in-rounds": Cut(8, 130, 1280, rows=16, warps_n=2, x_memory=2**14),
    "buffers-split": Cut(33, 100, 3328, rows=16, warps_n=2, warps_k=2, x_memory=2**17),
    "buffers-of-two-turns": Cut(8, 200, 2816, rows=16, warps_n=2, x_memory=2**14),
    "buffers-for-one-row": Cut(1, 90, 2560, rows=16, warps_k=2, x_memory=2**12),
    **{
        f"depth-{depth}": Cut(4, 100, 1280, rows=16, warps_n=2, warps_k=2, depth=depth)
        for depth in (1, 3, 4)
    },
}


@pytest.mark.parametrize("name", CUTS)
def test_kernel_equals_the_exact_product(
    name: str, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = CUTS[name].inputs()
    assert torch.equal(CUTS[name].run(kernel, inputs, monkeypatch), expected(**inputs))


@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 32, 33, 64])
def test_product_of_any_number_of_rows(
    M: int, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for K in (256, 1024):
        cut = Cut(M, 50, K)
        inputs = cut.inputs()
        assert torch.equal(cut.run(kernel, inputs, monkeypatch), expected(**inputs))


def test_no_rows_give_an_empty_product(kernel: Any) -> None:
    weight = nf4_quantize(torch.randn(5, 256).bfloat16())
    assert kernel.multiply(torch.zeros(0, 256).bfloat16(), weight, None).shape == (0, 5)


@pytest.mark.parametrize("K", [256, 1024, 4096, 11008, 14336, 65536])
@pytest.mark.parametrize("N", [1, 17, 4096, 6144, 28672, 32064, 100_000])
@pytest.mark.parametrize("M", [1, 2, 16, 17, 64])
def test_every_cut_fits_in_memory(M: int, N: int, K: int) -> None:
    config = nf4_few_rows_hopper.launch_config(M, N, K)
    assert config.num_warps in (1, 2, 4, 8, 16)
    assert max(M, 8) <= config.BLOCK_M
    assert config.TURNS >= 1
    x_bytes = config.BUFFERS * config.TURNS * config.WARPS_K * config.X_ROWS * 256 * 2
    assert x_bytes <= nf4_few_rows_hopper.X_MEMORY
    # The tables, x, and partial sums if warps share rows must fit the memory of a program
    sums = config.WARPS_N * config.ROWS * config.WARPS_K * config.BLOCK_M * 4
    assert 2**16 + 2**10 + x_bytes + (sums if config.WARPS_K > 1 else 0) <= 227 * 1024
    assert config.BUFFERS == 2 or config.TURNS * config.WARPS_K * 256 >= K


def test_supported_inputs() -> None:
    weight = nf4_quantize(torch.randn(3, 256).half())
    x = torch.zeros(70, 264).half()
    supports = nf4_few_rows_hopper.supports
    assert supports(x[:16, :256], weight)
    assert supports(x[1:2, 8:], weight)
    assert not supports(x[:0, :256], weight)
    assert not supports(x[:17, :256], weight), "all of x for three rows of the weight"
    assert not supports(x[:1, 4:260], weight), "not aligned"
    assert not supports(x.flatten()[: 16 * 260].view(16, 260)[:, :256], weight), "rows not aligned"


# Changes to the source, each with the case that must detect it
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "low nibble first": ("* 16, high, low],", "* 16, low, high],", "few-rows"),
    "a byte for its neighbor": ("0x76{i}4", "0x76{i ^ 1}4", "few-rows"),
    "second value first": ("${i}, f, e;", "${i}, e, f;", "few-rows"),
    "absmax of the turn before": ("stages[1], table", "stages[0], table", "buffers"),
    "the same half twice": ("_is_odd(place) == part", "_is_odd(place) == 0", "few-rows"),
    "codes of the first turn": ("flat + DEPTH", "flat", "buffers"),
    "halves as in memory": ("other = is_odd * 4", "other = is_odd * 0", "few-rows"),
    "columns in another order": (
        "(0, 1, 7, 2, 4, 6, 5, 3, 8)",
        "(0, 1, 7, 2, 4, 5, 6, 3, 8)",
        "few-rows",
    ),
    "upper rows first": (
        "left_operand(lower, upper, dtype, PRODUCT)",
        "left_operand(upper, lower, dtype, PRODUCT)",
        "few-rows",
    ),
    "permuted to a neighbor": ("l, h, 0x4051;", "l, h, 0x5140;", "buffers"),
    "numbers of a neighbor": ("p, q, 0x6420;", "p, q, 0x4620;", "buffers"),
    "numbers of the lower rows": (
        "code_values(upper_absmax",
        "code_values(lower_absmax",
        "buffers",
    ),
    "columns of x in another order": ("(0, 3, 4, 5, 2, 6, 1)", "(0, 3, 5, 4, 2, 6, 1)", "few-rows"),
    "the first nested absmax": (
        "nested = gl.load(nested_absmax_ptr + (blocks >> _NESTED_SHIFT))",
        "nested = gl.load(nested_absmax_ptr + blocks * 0)",
        "both-halves",
    ),
    "a nested code for its neighbor": (
        "table + TABLE_BYTES,",
        "table + TABLE_BYTES - 4,",
        "few-rows",
    ),
    "no offset": ("_LOWEST) + stage[4]", "_LOWEST)", "few-rows"),
    "warps along K are lost": ("gl.sum(acc, axis=0)", "acc[0]", "uneven-columns"),
    "bias dropped": ("if HAS_BIAS:", "if False:", "rounds"),
    "bias of the first tile": ("bias_ptr + n,", "bias_ptr + row,", "rounds"),
    "rows of the first round": ("round = flat // turns", "round = 0", "rounds"),
    "columns past the end": ("mask = mask & (step < steps)", "pass", "uneven-columns"),
    "blocks past the end": ("gl.where(is_there, absmax, 0.0)", "absmax", "infinite"),
    "rows of x past the end": ("(line // 4 < M)", "(line >= 0)", "seventeen-rows"),
    "rows of the weight past the end": (", rows - 1), N - 1)", ", rows - 1), N)", "one-weight-row"),
    "rows of the next program": ("(row < rows) & (n < N)", "n < N", "idle-warp"),
    "x before it is there": ("async_copy.wait_group(1)", "async_copy.wait_group(2)", "buffers"),
    "all of x before it is there": ("async_copy.wait_group(0)", "pass", "few-rows"),
    "buffers of the first round": (
        "(round * chunks + chunk) % 2",
        "chunk % 2",
        "buffers-in-rounds",
    ),
    "the next round's x is not copied": (
        "(chunk + 2) % chunks",
        "(chunk + 2)",
        "buffers-of-two-turns",
    ),
    "x by columns": ("* stride_x + step", "* (steps * 256) + step", "few-rows"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, case = MUTATIONS[name]
    kernel = load_module(*MODULES, change=(old, new))
    assert is_noticed(
        lambda inputs: CUTS[case].run(kernel, inputs, monkeypatch), CUTS[case].inputs()
    )
