"""Rows of the catalog: products with dense and NF4 weights, and NF4 (de)quantization."""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.catalog.attention import on_hopper
from idefics2_kernels.catalog.layouts import Layout, arrange, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.matmul import linear
from idefics2_kernels.nf4 import nf4_few_rows_hopper, nf4_matmul
from idefics2_kernels.nf4 import nf4_quantize as nf4
from idefics2_kernels.nf4.nf4_weight import BLOCK, NESTED_BLOCK, NF4Weight, nf4_code, stack
from idefics2_kernels.reference import nf4 as reference_nf4

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP32, _FP16, _BF16 = _DTYPES
_WEIGHT_SCALE = 0.05
# (M, N, K, dtype)
_TINY = (
    (1, 1, 1, _FP16),
    (1, 65, 63, _FP32),
    (5, 7, 65, _BF16),
    # There are two splits, and the last block of K is half full.
    (2, 70, 1088, _BF16),
    # There are two splits, and rows begin inside a block of NF4.
    (3, 33, 1100, _FP16),
    (16, 64, 128, _FP16),
    (4, 63, 64, _FP32),
    (17, 40, 192, _BF16),
    (70, 66, 100, _FP32),
    (0, 8, 16, _FP16),
    # The NF4 kernel for few rows needs multiples of 256 columns, as here and below.
    (2, 70, 2048, _BF16),
    (17, 130, 256, _FP16),
    (33, 65, 512, _BF16),
    (70, 30, 256, _BF16),
    # There are more splits than are loaded at once.
    (3, 70, 2600, _FP32),
)
_ROWS = (*range(1, 18), 31, 63, 64, 65, 127, 257, 1000)
_WEIGHTS = ((257, 1151), (1025, 1024), (641, 4304))  # (N, K)
_MODEL = {
    **{f"{N}x{K}-m{M}": (M, N, K)
       for (N, K), M in product(((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)), (1, 16, 64, 256, 2048))},
    "lm-head-m1": (1, 32064, 4096),
    "vision-fc1": (39200, 4304, 1152),
}  # fmt: skip


def _name(*parts: Any) -> str:
    return "-".join(str(part) for part in parts).replace("torch.", "")


def product_cases() -> tuple[Case, ...]:
    """Return the cases of a product."""
    cases = []
    dims: dict[str, Any]
    for i, (M, N, K, dtype) in enumerate(_TINY):
        dims = {"M": M, "N": N, "K": K, "bias": i % 2 == 0}
        cases.append(Case(_name(f"{M}x{N}x{K}", dtype), dims, dtype))
    base = {"M": 3, "N": 20, "K": 64, "bias": False}
    cases += [
        Case("sliced", {**base, "layout": "sliced"}, _BF16),
        Case("offset", {**base, "layout": "offset"}),
        Case("transposed", {**base, "B": 2, "layout": "transposed"}),
        Case("tiny", {**base, "scale": 1e-3}),
        Case("large", {**base, "scale": 100.0}, _BF16),
        Case("plain-statistics", {**base, "double_quant": False}),
        Case("integers", {**base, "N": 33, "integers": True}, _BF16),
        Case("sliced-wide", {**base, "K": 256, "layout": "sliced"}, _BF16),
        Case("offset-wide", {**base, "K": 256, "layout": "offset"}),
        Case("transposed-wide", {**base, "K": 256, "B": 2, "layout": "transposed"}),
        Case("plain-statistics-wide", {**base, "K": 512, "double_quant": False}),
        Case("tiny-wide", {**base, "K": 256, "scale": 1e-3}),
        Case("integers-wide", {**base, "K": 2048, "integers": True}, _BF16),
        Case("stacked", {**base, "N": 260, "stacked": 256}, _BF16),
        Case("stacked-wide", {**base, "N": 69, "K": 256, "stacked": 64}),
    ]
    for i, (M, (N, K), dtype) in enumerate(product(_ROWS, _WEIGHTS, _DTYPES)):
        dims = {"M": M, "N": N, "K": K, "bias": i % 2 == 0}
        cases.append(Case(_name("gpu", f"{M}x{N}x{K}", dtype), dims, dtype, "gpu"))
    layouts: tuple[Layout, ...] = ("sliced", "offset", "transposed")
    for layout, dtype, M in product(layouts, _DTYPES, (3, 70)):
        dims = {"M": M, "N": 300, "K": 1024, "bias": False, "layout": layout}
        if layout == "transposed":
            dims["B"] = 2
        cases.append(Case(_name("gpu", layout, f"m{M}", dtype), dims, dtype, "gpu"))
    for M, K, dtype in product((1, 16, 64), (1024, 4096, 14336), (_FP16, _BF16)):
        dims = {"M": M, "N": 512, "K": K, "bias": False, "integers": True}
        cases.append(Case(_name("gpu-integers", f"{M}x512x{K}", dtype), dims, dtype, "gpu"))
    one_row = ((1, 2048), (301, 6144), (4097, 4096), (70, 32768))
    for i, ((N, K), dtype) in enumerate(product(one_row, (_FP16, _BF16))):
        dims = {"M": 1, "N": N, "K": K, "bias": i % 3 == 0, "double_quant": i % 4 != 1}
        cases.append(Case(_name("gpu-one-row", f"{N}x{K}", dtype), dims, dtype, "gpu"))
    dims = {"M": 1, "N": 1540, "K": 4096, "bias": True, "stacked": 1024}
    cases.append(Case("gpu-one-row-stacked", dims, _BF16, "gpu"))
    for M in (1, 2):
        dims = {"M": M, "N": 70001, "K": 32768, "bias": False}
        cases.append(Case(f"gpu-2^31-elements-m{M}", dims, _BF16, "huge"))
    for name, (M, N, K) in _MODEL.items():
        dims = {"M": M, "N": N, "K": K, "bias": name.startswith("vision")}
        cases.append(Case(name, dims, _BF16, "model"))
    return tuple(cases)


def _x(case: Case, device: torch.device) -> Tensor:
    dims = case.dims
    layout = dims.get("layout", "plain")
    shape = (dims["B"], dims["M"], dims["K"]) if "B" in dims else (dims["M"], dims["K"])
    if dims.get("integers"):
        return torch.randint(-1, 2, shape, device=device).to(case.dtype)
    return normal(
        *shape, dtype=case.dtype, device=device, layout=layout, scale=dims.get("scale", 1.0)
    )


def _weight(case: Case, device: torch.device, integers: int) -> Tensor:
    shape = (case.dims["N"], case.dims["K"])
    if case.dims.get("integers"):
        return integers * torch.randint(-1, 2, shape, device=device).to(case.dtype)
    return normal(*shape, dtype=case.dtype, device=device, scale=_WEIGHT_SCALE)


def _bias(case: Case, device: torch.device) -> Tensor | None:
    return normal(case.dims["N"], dtype=case.dtype, device=device) if case.dims["bias"] else None


def linear_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``linear``."""
    weight = _weight(case, device, integers=1)
    # Only x has the layout, so that the strides of x and weight differ.
    if case.dims.get("layout") == "offset":
        weight = arrange(weight, "sliced")
    return {"x": _x(case, device), "weight": weight, "bias": _bias(case, device)}


def nf4_matmul_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``nf4_matmul``."""
    dense = _weight(case, device, integers=2)
    # NF4 represents -2, 0 and 2 exactly: as the codes of -1, 0 and 1 with an absmax of 2. Double
    # quantization would round the absmax.
    double_quant = case.dims.get("double_quant", not case.dims.get("integers"))
    weight = _quantized(case, dense, double_quant)
    return {"x": _x(case, device), "weight": weight, "bias": _bias(case, device)}


def _quantized(case: Case, dense: Tensor, double_quant: bool) -> NF4Weight:
    """Quantize ``dense``, in two stacked parts if the case has ``stacked`` rows.

    Each part then has its own offset.
    """
    rows = case.dims.get("stacked")
    parts = [dense] if rows is None else [dense[:rows], 3 * dense[rows:]]
    quantized = [reference_nf4.nf4_quantize(p, double_quant=double_quant) for p in parts]
    return quantized[0] if rows is None else stack(quantized)


def _suits_few_rows(case: Case) -> bool:
    """Return whether the kernel for few rows is tested on this case.

    These are the cases for which ``nf4_matmul`` calls it, and some with more rows.
    """
    rows = case.dims.get("B", 1) * case.dims["M"]
    return case.dtype is not _FP32 and case.dims["K"] % 256 == 0 and rows <= 100


def _plain_few_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    return nf4_matmul.few_rows(x, weight, bias, plain=True)


def _gluon_few_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    out = nf4_few_rows_hopper.multiply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _has_gluon(case: Case) -> bool:
    """Return whether Hopper has two kernels for few rows for this case, one of them in Gluon."""
    rows = case.dims.get("B", 1) * case.dims["M"]
    return on_hopper() and _suits_few_rows(case) and 0 < rows <= nf4_few_rows_hopper.MAX_M


def _has_aligned_gluon(case: Case) -> bool:
    return _has_gluon(case) and "layout" not in case.dims


def _suits_many_rows(case: Case) -> bool:
    """Return whether the kernel for many rows computes this case.

    It must be compiled for Hopper, and TMA must be able to read the rows.
    """
    return (
        on_hopper()
        and case.dtype is not _FP32
        and case.dims["K"] % BLOCK == 0
        # Rows of this layout are not aligned.
        and case.dims.get("layout") != "offset"
    )


def _suits_dequantized(case: Case) -> bool:
    """Return whether the way over a dequantized weight is tested on this case.

    The interpreter takes long to dequantize a large weight, and ``nf4_dequantize`` has its own
    cases.
    """
    return case.where != "any" or case.dims["N"] * case.dims["K"] <= 10_000


def nf4_bytes(elements: int) -> int:
    """Return the bytes of ``elements`` in NF4, 0.5159 each.

    An element has half a byte, a block has one byte, and a nested block has four bytes.
    """
    blocks = -(-elements // BLOCK)
    return -(-elements // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)


def _product_cost(case: Case, weight_bytes: int) -> Cost:
    M, N, K = case.dims.get("B", 1) * case.dims["M"], case.dims["N"], case.dims["K"]
    activations = M * (N + K) + (N if case.dims["bias"] else 0)
    return Cost(bytes=activations * case.dtype.itemsize + weight_bytes, flops=2 * M * N * K)


def _linear_cost(case: Case) -> Cost:
    return _product_cost(case, case.dims["N"] * case.dims["K"] * case.dtype.itemsize)


def _nf4_matmul_cost(case: Case) -> Cost:
    return _product_cost(case, nf4_bytes(case.dims["N"] * case.dims["K"]))


_SHAPES = ((1,), (7,), (64,), (65,), (3, 21), (5, 72), (8, 130), (2, 3, 50), (260, 64))
_GPU_SHAPES = (
    *((63,), (127,), (128,), (129,), (4095,), (4097,), (16384,), (16385,)),
    *((1, 1), (31, 33), (257, 63), (1151, 577), (1024, 4096), (1152, 4304), (3, 5, 7, 11)),
)


def _quantize_cases() -> tuple[Case, ...]:
    cases = []
    for i, shape in enumerate(_SHAPES):
        dims = {"shape": shape, "double_quant": i % 3 != 1}
        dtype = _DTYPES[i % 3]
        cases.append(Case(_name("x".join(map(str, shape)), dtype), dims, dtype))
    cases += [
        Case("sliced", {"shape": (5, 72), "layout": "sliced"}, _FP32),
        Case("zeros", {"shape": (4, 70), "values": "zeros"}, _BF16),
        Case("ties", {"shape": (30, 64), "values": "ties", "double_quant": False}, _FP32),
        Case("wide-range", {"shape": (6, 70), "values": "wide"}, _FP32),
        Case("wide-range-in-words", {"shape": (6, 72), "values": "wide"}, _BF16),
        Case("subnormal", {"shape": (3, 70), "values": "subnormal", "double_quant": False}, _FP32),
        Case("stacked", {"shape": (69, 256), "stacked": 64}, _BF16),
    ]
    for shape, dtype in product(_GPU_SHAPES, _DTYPES):
        dims = {"shape": shape, "double_quant": dtype is not _FP16}
        cases.append(Case(_name("gpu", "x".join(map(str, shape)), dtype), dims, dtype, "gpu"))
    cases.append(Case("gpu-2^31-elements", {"shape": (2**31 + 197,)}, _BF16, "huge"))
    cases.append(Case("gpu-2^31-elements-in-words", {"shape": (2**31 + 200,)}, _BF16, "huge"))
    cases += [
        Case(f"{N}x{K}", {"shape": (N, K)}, _BF16, "model")
        for N, K in ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (4304, 1152))
    ]
    return tuple(cases)


def _values(case: Case, device: torch.device) -> Tensor:
    shape, values = case.dims["shape"], case.dims.get("values", "normal")
    drawn = normal(*shape, dtype=_FP32, device=device, scale=_WEIGHT_SCALE)
    # The zeros are one block, and the last one, which is not full.
    if values == "zeros":
        drawn.view(-1)[BLOCK : 2 * BLOCK] = 0
        drawn.view(-1)[drawn.numel() // BLOCK * BLOCK :] = 0
    # Each block begins with 1, and continues with midpoints between neighboring values of NF4.
    elif values == "ties":
        code = nf4_code(device)
        middle = (code[:-1] + code[1:]) / 2
        drawn = torch.cat([code[-1:], middle.repeat(5)])[:BLOCK].repeat(shape[0], 1)
        drawn *= torch.linspace(1, 3, shape[0], device=device)[:, None]
    elif values == "wide":
        drawn *= 10.0 ** torch.linspace(-35, 38, drawn.numel(), device=device).view(shape)
    elif values == "subnormal":
        drawn *= 1e-38
    return arrange(drawn.to(case.dtype), case.dims.get("layout", "plain"))


def _quantize_inputs(case: Case, device: torch.device) -> Inputs:
    double_quant = case.dims.get("double_quant", True)
    return {"weight": _values(case, device), "double_quant": double_quant}


def _dequantize_inputs(case: Case, device: torch.device) -> Inputs:
    inputs = _quantize_inputs(case, device)
    return {"weight": _quantized(case, inputs["weight"], inputs["double_quant"])}


def _quantize_cost(case: Case) -> Cost:
    elements = math.prod(case.dims["shape"])
    return Cost(bytes=elements * case.dtype.itemsize + nf4_bytes(elements), flops=2 * elements)


PRODUCTS = (
    KernelSpec(
        name="linear",
        make_inputs=linear_inputs,
        cases=product_cases(),
        cost=_linear_cost,
        implementations={
            "triton": linear.linear,
            "split_k": linear.split_k,
            "tiled": linear.tiled,
        },
    ),
    KernelSpec(
        name="linear_gelu",
        make_inputs=linear_inputs,
        cases=tuple(
            case
            for case in product_cases()
            if case.where in ("any", "gpu") or case.name == "vision-fc1"
        ),
        cost=_linear_cost,
        implementations={"triton": linear.linear_gelu},
    ),
    KernelSpec(
        name="nf4_matmul",
        make_inputs=nf4_matmul_inputs,
        cases=product_cases(),
        cost=_nf4_matmul_cost,
        implementations={
            "triton": nf4_matmul.nf4_matmul,
            "fused": nf4_matmul.fused,
            "few_rows": nf4_matmul.few_rows,
            "plain": _plain_few_rows,
            "gluon": _gluon_few_rows,
            "many_rows": nf4_matmul.many_rows,
            "dequantized": nf4_matmul.dequantized,
        },
        only={
            "few_rows": _suits_few_rows,
            "plain": _has_gluon,
            "gluon": _has_aligned_gluon,
            "many_rows": _suits_many_rows,
            "dequantized": _suits_dequantized,
        },
    ),
    KernelSpec(
        name="nf4_quantize",
        make_inputs=_quantize_inputs,
        cases=_quantize_cases(),
        cost=_quantize_cost,
        implementations={"triton": nf4.nf4_quantize},
        outputs=lambda _inputs, result: tuple(result.tensors.values()),
        exact=True,
    ),
    KernelSpec(
        name="nf4_dequantize",
        make_inputs=_dequantize_inputs,
        cases=_quantize_cases(),
        cost=_quantize_cost,
        implementations={"triton": nf4.nf4_dequantize},
        exact=True,
    ),
)
