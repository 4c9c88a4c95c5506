"""Row of the catalog: the product with a low-rank product beside it."""

from itertools import product
from typing import Any

import torch

from idefics2_kernels import lora_linear
from idefics2_kernels.catalog.layouts import Layout, arrange, normal
from idefics2_kernels.catalog.products import nf4_bytes
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.reference.nf4 import nf4_quantize

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP32, _FP16, _BF16 = _DTYPES
_SCALE = 0.05
# (M, N, K, R, dtype). Every second one has its base in NF4, every third a bias.
_TINY = (
    (1, 1, 1, 1, _FP16),
    (1, 65, 64, 4, _FP32),
    (5, 7, 65, 3, _BF16),
    (2, 130, 192, 8, _FP16),
    (16, 64, 128, 16, _BF16),
    (3, 70, 256, 24, _BF16),
    (4, 63, 64, 65, _FP32),
    # More rows than the kernel for few, and a tile that is not full.
    (17, 140, 64, 17, _BF16),
    (70, 66, 100, 8, _FP32),
    (65, 30, 128, 64, _FP16),
    # The rank is summed in several blocks.
    (2, 40, 64, 150, _BF16),
    (18, 33, 64, 200, _FP32),
    (0, 8, 16, 4, _FP16),
    (3, 0, 16, 4, _FP16),
    (3, 8, 16, 0, _FP16),
)
_ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 129, 513, 1000)
_SIZES = ((257, 1152), (1025, 1024))  # (N, K)
_RANKS = (4, 16, 24, 64)
# The products of a layer of the 8B model. An adapter of rank 8 has 24 rows for queries, keys and
# values, 16 for gate and up, and all are padded to a multiple of 16.
_LAYER = {(6144, 4096): 32, (4096, 4096): 16, (28672, 4096): 16, (4096, 14336): 16}
_MODEL_ROWS = (1, 16, 32, 128, 2048)


def _name(*parts: Any) -> str:
    return "-".join(str(part) for part in parts).replace("torch.", "")


def _cases() -> tuple[Case, ...]:
    cases = []
    dims: dict[str, Any]
    for i, (M, N, K, R, dtype) in enumerate(_TINY):
        dims = {"M": M, "N": N, "K": K, "R": R, "nf4": i % 2 == 1, "bias": i % 3 == 0}
        cases.append(Case(_name(f"{M}x{N}x{K}-r{R}", dtype), dims, dtype))
    base = {"M": 3, "N": 20, "K": 64, "R": 8, "nf4": True, "bias": False}
    cases += [
        Case("sliced", {**base, "layout": "sliced"}, _BF16),
        Case("offset", {**base, "nf4": False, "layout": "offset"}),
        Case("transposed", {**base, "B": 2, "layout": "transposed"}),
        Case("many-transposed", {**base, "M": 9, "B": 2, "layout": "transposed"}),
        Case("tiny", {**base, "scale": 1e-3}),
        Case("large", {**base, "scale": 100.0}, _BF16),
        # The base hardly counts, so an error of the low-rank product is not hidden behind it.
        Case("low-rank-alone", {**base, "M": 20, "base_scale": 1e-4}, _FP32),
        Case("few-low-rank-alone", {**base, "R": 40, "base_scale": 1e-4}, _BF16),
    ]
    for i, (M, (N, K), R) in enumerate(product(_ROWS, _SIZES, _RANKS)):
        dtype = _DTYPES[i % 3]
        dims = {"M": M, "N": N, "K": K, "R": R, "nf4": i % 4 < 2, "bias": i % 5 == 0}
        cases.append(Case(_name("gpu", f"{M}x{N}x{K}-r{R}", dtype), dims, dtype, "gpu"))
    layouts: tuple[Layout, ...] = ("sliced", "offset", "transposed")
    for layout, dtype, M in product(layouts, _DTYPES, (3, 70)):
        dims = {**base, "M": M, "N": 300, "K": 1024, "R": 24, "nf4": M == 3, "layout": layout}
        if layout == "transposed":
            dims["B"] = 2
        cases.append(Case(_name("gpu", layout, f"m{M}", dtype), dims, dtype, "gpu"))
    dims = {"M": 70_001, "N": 32_768, "K": 64, "R": 16, "nf4": False, "bias": False}
    cases.append(Case("gpu-2^31-elements", dims, _BF16, "huge"))
    for ((N, K), R), M in product(_LAYER.items(), _MODEL_ROWS):
        dims = {"M": M, "N": N, "K": K, "R": R, "nf4": True, "bias": False}
        cases.append(Case(f"{N}x{K}-r{R}-m{M}", dims, _BF16, "model"))
    # Ranks 4 and 64 of the widest product, whose b is the largest.
    for R, M in product((4, 128), (1, 2048)):
        dims = {"M": M, "N": 28672, "K": 4096, "R": R, "nf4": True, "bias": False}
        cases.append(Case(f"28672x4096-r{R}-m{M}", dims, _BF16, "model"))
    dims = {"M": 4900, "N": 4304, "K": 1152, "R": 16, "nf4": False, "bias": True}
    cases.append(Case("vision-fc1-r16", dims, _BF16, "model"))
    return tuple(cases)


def _inputs(case: Case, device: torch.device) -> Inputs:
    dims, dtype = case.dims, case.dtype
    M, N, K, R = (dims[name] for name in ("M", "N", "K", "R"))
    shape = (dims["B"], M, K) if "B" in dims else (M, K)
    layout = dims.get("layout", "plain")
    x = normal(*shape, dtype=dtype, device=device, layout=layout, scale=dims.get("scale", 1.0))
    dense = normal(N, K, dtype=dtype, device=device, scale=dims.get("base_scale", _SCALE))
    a = normal(R, K, dtype=dtype, device=device, scale=_SCALE)
    b = normal(N, R, dtype=dtype, device=device, scale=0.5)
    # Only x has the layout, so that the strides of x, the base, a and b differ.
    if layout == "offset":
        a, b = arrange(a, "sliced"), arrange(b, "sliced")
    return {
        "x": x,
        "base": nf4_quantize(dense) if dims["nf4"] else dense,
        "a": a,
        "b": b,
        "scale": 1.5,
        "bias": normal(N, dtype=dtype, device=device) if dims["bias"] else None,
    }


def _cost(case: Case) -> Cost:
    M, N, K, R = case.dims.get("B", 1) * case.dims["M"], *(case.dims[name] for name in "NKR")
    numbers = (M + R) * (N + K) + (N if case.dims["bias"] else 0)
    base = nf4_bytes(N * K) if case.dims["nf4"] else N * K * case.dtype.itemsize
    flops = 2 * M * (N * K + R * (N + K))
    return Cost(bytes=numbers * case.dtype.itemsize + base, flops=flops)


LORA_LINEAR = KernelSpec(
    name="lora_linear",
    make_inputs=_inputs,
    cases=_cases(),
    cost=_cost,
    implementations={"triton": lora_linear.lora_linear},
)
