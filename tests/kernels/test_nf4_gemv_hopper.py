"""NF4's kernel for one row on a CPU: every weight bit for bit, its reads and its sums."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gluon_emulator.loader import load_module
from guarded import guarded_allocations
from idefics2_kernels.nf4 import nf4_gemv_hopper
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize
from nf4_product import DTYPES, Product, expected, is_noticed

pytestmark = pytest.mark.long

MODULES = ("gpu.dependent_launch_gluon", "nf4.dequantize_gluon", "nf4.nf4_gemv_hopper")


@pytest.fixture(scope="module")
def kernel() -> Any:
    return load_module(*MODULES)


@dataclass(frozen=True, kw_only=True)
class Cut(Product):
    """A product and its division among warps.

    The kernel chooses the division, unless ``warps_n`` is given.
    """

    warps_n: int = 0
    depth: int = 1
    programs: int = 2

    def run(self, kernel: Any, inputs: dict[str, Any]) -> Tensor:
        config = kernel.launch_config(self.N, self.K)
        if self.warps_n:
            config = replace(config, WARPS_N=self.warps_n, DEPTH=self.depth, programs=self.programs)
        with guarded_allocations():
            out: Tensor = kernel.launch(**inputs, config=config)
            return out


@pytest.mark.parametrize(("dtype", "double_quant"), [*product(DTYPES, (True, False))])
def test_every_weight_bit_for_bit(dtype: torch.dtype, double_quant: bool, kernel: Any) -> None:
    """A row of x with a single one returns the weights of that column.

    The weights have all codes in both nibbles, and absmaxes across the range of the dtype.
    """
    scales = torch.logspace(-6, 3, 70)[:, None]
    weight = nf4_quantize((torch.randn(70, 2048) * scales).to(dtype), double_quant=double_quant)
    wanted = nf4_dequantize(weight)
    # The division that the kernel chooses, but for its 132 programs of one pair of rows
    cut = Cut(1, 70, 2048, warps_n=8, depth=2, programs=3)
    for column in (0, 1, 2, 7, 8, 31, 32, 63, 64, 255, 256, 1023, 2047):
        rows = torch.zeros(1, 2048, dtype=dtype)
        rows[0, column] = 1
        out = cut.run(kernel, {"rows": rows, "weight": weight, "bias": None})
        assert torch.equal(out[0], wanted[:, column])


CUTS: dict[str, Cut] = {
    # The kernel chooses the division
    "square": Cut(1, 300, 4096),
    "one-warp-along-k": Cut(1, 70, 2048, double_quant=False),
    "long": Cut(1, 40, 14336, dtype=torch.float16),
    "longest": Cut(1, 3, 32768, bias=False),
    "one-weight-row": Cut(1, 1, 2048),
    "many-programs": Cut(1, 5000, 2048, bias=False),
    "three-warps-along-k": Cut(1, 65, 6144, bias=False),
    # There are several rounds, and prefetches past the last one
    "rounds": Cut(1, 200, 2048, warps_n=4),
    "rounds-deep": Cut(1, 75, 4096, warps_n=2, depth=3),
    "rounds-of-one-warp": Cut(1, 31, 2048, warps_n=1, depth=2, double_quant=False),
    # Weights are infinite, so a warp without columns must add nothing
    "infinite": Cut(1, 20, 6144, double_quant=False, dtype=torch.float16, absmax=1e6),
}


@pytest.mark.parametrize("name", CUTS)
def test_products(name: str, kernel: Any) -> None:
    cut = CUTS[name]
    inputs = cut.inputs()
    assert torch.equal(cut.run(kernel, inputs), expected(**inputs))


def test_launch_of_a_hopper_gpu(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper = {"IS_DEPENDENT": True, "launch_pdl": True}
    monkeypatch.setattr(kernel, "dependent_options", lambda: on_hopper)
    inputs = CUTS["one-weight-row"].inputs()
    assert torch.equal(CUTS["one-weight-row"].run(kernel, inputs), expected(**inputs))


@pytest.mark.parametrize(
    ("N", "K"), [*product((1, 4096, 6144, 28672, 128256), (2048, 4096, 14336, 32768))]
)
def test_parts_of_all_rows_fit(N: int, K: int) -> None:
    config = nf4_gemv_hopper.launch_config(N, K)
    assert config.num_warps in (8, 16)
    assert config.WARPS_K * nf4_gemv_hopper.COLUMNS >= K
    pairs = nf4_gemv_hopper.pairs_per_program(N, config.programs)
    # A warp may write parts that are never read
    rounds = -(-pairs // config.WARPS_N)
    rows = 2 * rounds * config.WARPS_N
    assert rows * nf4_gemv_hopper.row_bytes(config.WARPS_K) <= nf4_gemv_hopper.PARTS_MEMORY


def test_supported_inputs() -> None:
    weight = nf4_quantize(torch.randn(3, 2048).half())
    x = torch.zeros(4, 2056).half()
    supports = nf4_gemv_hopper.supports
    assert supports(x[:1, :2048], weight)
    assert supports(x[1:2, 8:], weight)
    assert not supports(x[:0, :2048], weight)
    assert not supports(x[:2, :2048], weight)
    assert not supports(x[:1, 4:2052], weight), "not aligned"
    assert not supports(x[:1, :1024], nf4_quantize(torch.randn(3, 1024).half()))


# Changes to the source, each with the case that must detect it
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "low nibble first": ("* 16, high, low],", "* 16, low, high],", "square"),
    "the lane's place is left out": ("% PLACES * 8", "% PLACES * 0 + 1", "square"),
    "halves as in memory": (
        "is_odd = (eighth % 2 +",
        "is_odd = (eighth * 0 +",
        "one-warp-along-k",
    ),
    "x as in memory": ("half = (part + line // 4) % 2", "half = part + line * 0", "square"),
    "eighths of x in another order": ("line // 4 * steps + k", "line // 4 + k * 8", "square"),
    "codes of the round before": ("base + turn + DEPTH, CODES", "base + turn, CODES", "rounds"),
    "rows of the first program": ("first = gl.program_id(0) * pairs * 2", "first = 0", "square"),
    "rows past the end": ("* 2 + upper, N - 1)", "* 2 + upper, N)", "one-weight-row"),
    "columns past the end": (
        "gl.minimum(k, steps - 1)) * 4",
        "k) * 4",
        "three-warps-along-k",
    ),
    "a warp without columns counts": (
        "gl.where(i // 2 < steps,",
        "gl.where(i >= 0,",
        "three-warps-along-k",
    ),
    "one half of the sums": ("gl.static_range(WARPS_K * 2)", "gl.static_range(WARPS_K)", "square"),
    "another's eighth": ("gl.where(is_odd, odd, even)", "gl.where(is_odd, even, odd)", "square"),
    "sums of all eighths": ("@p st.shared.f32", "st.shared.f32", "square"),
    "sums of the first round": (
        "(base + turn) * (WARPS_N * 2 * ROW_BYTES)",
        "0 * ROW_BYTES",
        "rounds",
    ),
    "bias dropped": ("if HAS_BIAS:", "if False:", "square"),
    "bias of the first program": ("bias_ptr + first + row", "bias_ptr + row", "square"),
    "no offset": ("_LOWEST) + stage[4]", "_LOWEST)", "square"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str) -> None:
    old, new, case = MUTATIONS[name]
    kernel = load_module(*MODULES, change=(old, new))
    assert is_noticed(lambda inputs: CUTS[case].run(kernel, inputs), CUTS[case].inputs())
