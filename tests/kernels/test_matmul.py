"""Matrix products apart from parity: exact cases, equal rows in any batch, errors."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels import TRITON
from idefics2_kernels.catalog import CATALOG, Case
from idefics2_kernels.catalog.spec import widen_inputs
from idefics2_kernels.gpu.checks import FLOATS
from idefics2_kernels.matmul import linear
from idefics2_kernels.matmul.split_k import k_per_split
from idefics2_kernels.nf4 import dequantize_triton, nf4_matmul
from idefics2_kernels.nf4 import nf4_quantize as nf4
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

SPECS = {spec.name: spec for spec in CATALOG}
PRODUCTS = [
    (name, implementation, case)
    for name in ("linear", "nf4_matmul")
    for implementation in SPECS[name].implementations
    for case in SPECS[name].cases
    if case.dims.get("integers")
    if implementation not in SPECS[name].only or SPECS[name].only[implementation](case)
    # cuBLAS may round the partial results of its own splits
    if (name, implementation) != ("linear", "triton") or case.dims["M"] <= linear.FEW_ROWS
    if implementation != "dequantized"
]


def _integer_product(name: str, implementation: str, case: Case, device: torch.device) -> None:
    """Multiply integers whose products and sums are exact.

    The tensor cores then round nothing but the result.
    """
    spec = SPECS[name]
    inputs = spec.make_inputs(case, device)
    (exact,) = spec.expected(widen_inputs(inputs))
    (ours,) = spec.run(spec.implementations[implementation], inputs)
    assert exact.abs().max() > 1
    assert torch.equal(exact, exact.round())
    assert torch.equal(ours, exact.to(case.dtype))


@pytest.mark.parametrize(
    ("name", "implementation", "case"), [row for row in PRODUCTS if row[2].where == "any"]
)
def test_integers_are_exact(
    name: str, implementation: str, case: Case, device: torch.device
) -> None:
    _integer_product(name, implementation, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "implementation", "case"), [row for row in PRODUCTS if row[2].where == "gpu"]
)
def test_integers_are_exact_compiled(
    name: str, implementation: str, case: Case, device: torch.device
) -> None:
    _integer_product(name, implementation, case, device)


@triton.jit
def _permute_kernel(a_ptr, b_ptr, out_ptr, selector):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 64)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, dequantize_triton.permute_bytes(a, b, tl.zeros_like(a) + selector))


@pytest.mark.parametrize(
    ("dtype", "double_quant"),
    [
        (torch.float32, True),
        (torch.float32, False),
        (torch.float16, True),
        (torch.bfloat16, False),
    ],
)
@pytest.mark.parametrize("K", [64, 192, 37, 256, 512])
def test_product_dequantizes_bit_for_bit(
    K: int, dtype: torch.dtype, double_quant: bool, device: torch.device
) -> None:
    """Rows of the identity return the weights one by one."""
    weight = nf4_quantize(torch.randn(70, K, device=device).to(dtype), double_quant=double_quant)
    eye = torch.eye(K, dtype=dtype, device=device)
    expected = nf4_dequantize(weight).t()
    products = [nf4_matmul.fused]
    if K % 256 == 0 and dtype is not torch.float32:
        products.append(nf4_matmul.few_rows)
    # Every seventh row has a column of every place in a word
    columns = torch.arange(0, K, 7 if K > 256 else 1, device=device)
    for index, product in itertools.product((columns[:16], columns), products):
        assert torch.equal(product(eye[index], weight), expected[index])


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x4051, 0x6273, 0xD9C8, 0xFBEA, 0x70F0])
def test_permute_equals_the_ptx_instruction(selector: int, device: torch.device) -> None:
    """In the interpreter this tests the emulation of the instruction."""
    words = torch.randint(-(2**31), 2**31, (2, 64), dtype=torch.int32, device=device)
    out = torch.empty_like(words[0])
    _permute_kernel[(1,)](words[0], words[1], out, selector)
    parts = words.cpu().numpy().astype("<i4")
    bytes_of = np.concatenate([parts[i].view("u1").reshape(64, 4) for i in (0, 1)], axis=1)
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    columns = [bytes_of[:, n & 7] if n < 8 else (bytes_of[:, n & 7] >> 7) * 255 for n in nibbles]
    expected = np.stack(columns, axis=1).astype("u1").view("<i4")[:, 0]
    assert torch.equal(out.cpu(), torch.from_numpy(expected.copy()))


@pytest.fixture
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply row by row.

    A processor's BLAS may sum rows at the edge of its tile in another order.
    """
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk->ik", a, b, dtype=dtype))


# With their numbers of rows and columns. From 1024 columns on there are splits.
INVARIANT: list[tuple[Callable[..., Tensor], int, int]] = [
    (linear.tiled, 130, 300),
    (linear.split_k, 16, 1100),
]


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("product", "M", "K"), INVARIANT)
def test_row_does_not_depend_on_other_rows(
    product: Callable[..., Tensor], M: int, K: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = (
        torch.randn(shape, device=device).to(dtype) for shape in ((M, K), (70, K), (70,))
    )
    whole = product(x, weight, bias)
    for rows in ([0], [M - 1], [7, 3], range(1, 14), range(5, M)):
        index = torch.tensor(list(rows), device=device)
        assert torch.equal(product(x[index], weight, bias), whole[index])
    other = torch.randn_like(x)
    other[5] = x[5]
    assert torch.equal(product(other, weight, bias)[5], whole[5])


def test_many_rows_go_to_cublas(device: torch.device) -> None:
    x, weight = torch.randn(17, 64, device=device), torch.randn(20, 64, device=device)
    assert torch.equal(linear.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.equal(linear.linear(x[:16], weight), linear.split_k(x[:16], weight))


def test_many_rows_are_multiplied_by_the_dequantized_weight(device: torch.device) -> None:
    x, weight = torch.randn(129, 64, device=device), torch.randn(20, 64, device=device)
    quantized = nf4_quantize(weight)
    expected = torch.nn.functional.linear(x, nf4_dequantize(quantized))
    assert torch.equal(nf4_matmul.nf4_matmul(x, quantized), expected)


@pytest.mark.parametrize("K", [0, 1, 63, 64, 1000, 1088, 4096, 4304, 14336, 14337])
@pytest.mark.parametrize("N", [1, 64, 4096, 6144, 28672, 32003])
def test_splits_cover_k_without_empty_ones(N: int, K: int) -> None:
    for block_k, programs in ((64, 264), (128, 264), (128, 528)):
        part = k_per_split(-(-N // 64), K, block_k, programs)
        splits = max(-(-K // part), 1)
        assert part % block_k == 0
        assert K == 0 or (splits - 1) * part < K <= splits * part
        assert splits == 1 or splits * -(-N // 64) <= programs


@pytest.mark.parametrize("shape", [(64,), (2, 0, 64), (2, 3, 64), (0, 64)])
def test_leading_axes_are_kept(shape: tuple[int, ...], device: torch.device) -> None:
    x, dense = torch.randn(shape, device=device), torch.randn(9, 64, device=device)
    bias = torch.randn(9, device=device)
    quantized = nf4_quantize(dense)
    for ours in (linear.linear, linear.split_k, linear.tiled):
        expected = torch.nn.functional.linear(x, dense, bias)
        torch.testing.assert_close(ours(x, dense, bias), expected, rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.linear(x, nf4_dequantize(quantized), bias)
    torch.testing.assert_close(nf4_matmul.fused(x, quantized, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize(
    ("M", "dtype"), [(16, torch.float16), (32, torch.bfloat16), (64, torch.float16)]
)
def test_row_of_few_rows_does_not_depend_on_other_rows(
    M: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(M, 2048, device=device).to(dtype)
    weight = nf4_quantize(torch.randn(40, 2048, device=device).to(dtype))
    whole = nf4_matmul.few_rows(x, weight)
    # The tile is the same for both numbers of rows
    first = M // 2 - 1
    assert torch.equal(nf4_matmul.few_rows(x[first:], weight), whole[first:])


def test_unaligned_codes_use_the_other_kernel(device: torch.device) -> None:
    x = torch.randn(3, 256, device=device).bfloat16()
    weight = nf4_quantize(torch.randn(5, 256, device=device).bfloat16())
    moved = torch.cat([weight.codes[:1], weight.codes])[1:]
    shifted = dataclasses.replace(weight, codes=moved)
    assert torch.equal(nf4_matmul.nf4_matmul(x, weight), nf4_matmul.few_rows(x, weight))
    assert torch.equal(nf4_matmul.nf4_matmul(x, shifted), nf4_matmul.fused(x, weight))
    with pytest.raises(ValueError, match="codes must begin at a multiple of 4 bytes, got 1"):
        nf4_matmul.few_rows(x, shifted)


def test_split_products_accept_no_rows(device: torch.device) -> None:
    x, weight = torch.randn(0, 2048, device=device), torch.randn(9, 2048, device=device)
    assert linear.split_k(x, weight).shape == (0, 9)
    assert nf4_matmul.fused(x, nf4_quantize(weight)).shape == (0, 9)


def test_k_of_zero_gives_the_bias(device: torch.device) -> None:
    x, weight = torch.randn(3, 0, device=device), torch.randn(5, 0, device=device)
    bias = torch.randn(5, device=device)
    for ours in (linear.split_k, linear.tiled):
        assert torch.equal(ours(x, weight, bias), bias.expand(3, 5))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have an axis"),
    "x-dtype": ({"x": torch.zeros(2, 64, dtype=torch.int32)}, TypeError, "x must be bfloat16"),
    "x-float64": ({"x": torch.zeros(2, 64, dtype=torch.float64)}, TypeError, "x must be bfloat16"),
    "x-strides": ({"x": torch.zeros(64, 2).t()}, ValueError, "x must have a contiguous last axis"),
    "x-columns": ({"x": torch.zeros(2, 63)}, ValueError, r"weight must have shape \(\*, 63\)"),
    "mixed": ({"x": torch.zeros(2, 64, dtype=torch.half)}, TypeError, "weight must be float16"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5\)"),
    "bias-dtype": ({"bias": torch.zeros(5).half()}, TypeError, "bias must be float32"),
    "bias-strides": ({"bias": torch.zeros(10)[::2]}, ValueError, "bias must have a contiguous"),
    "device": ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on"),
}


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on the device with its strides, which ``to`` does not keep if there are gaps."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name: str, device: torch.device) -> None:
    changes, error, message = BAD[name]
    inputs: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": torch.zeros(5, 64), "bias": None}
    inputs = {
        k: v if v is None or v.is_meta else _moved(v, device) for k, v in (inputs | changes).items()
    }
    dense: list[Callable[..., Tensor]] = [TRITON.linear, linear.split_k, linear.tiled]
    quantized: list[Callable[..., Tensor]] = [TRITON.nf4_matmul, nf4_matmul.fused]
    for ours in dense:
        with pytest.raises(error, match=message):
            ours(**inputs)
    inputs["weight"] = nf4_quantize(inputs["weight"])
    for ours in quantized:
        with pytest.raises(error, match=message):
            ours(**inputs)


def test_wrong_weights_are_refused(device: torch.device) -> None:
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match="weight must have a contiguous last axis"):
        linear.linear(x, torch.zeros(64, 5, device=device).t())
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, 64\), got \(320,\)"):
        nf4_matmul.nf4_matmul(x, nf4_quantize(torch.zeros(320, device=device)))
    with pytest.raises(ValueError, match=r"rows of a multiple of 256, got \(5, 64\)"):
        nf4_matmul.few_rows(x.half(), nf4_quantize(torch.zeros(5, 64, device=device).half()))
    with pytest.raises(TypeError, match="weight must be bfloat16 or float16, got float32"):
        nf4_matmul.few_rows(x, nf4_quantize(torch.zeros(5, 64, device=device)))
    with pytest.raises(TypeError, match="weight must be bfloat16 or float16 or float32, got int32"):
        nf4.nf4_quantize(torch.zeros(64, dtype=torch.int32, device=device))


def test_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics2_kernels.gpu.checks.INTERPRETED", False)
    weight = nf4_quantize(torch.zeros(5, 64))
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: TRITON.linear(torch.zeros(2, 64), torch.zeros(5, 64)),
        "weight": lambda: TRITON.nf4_quantize(torch.zeros(5, 64)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} must be on a CUDA device, got cpu"):
            call()
    with pytest.raises(
        ValueError, match="x must be on a CUDA device, got cpu; set TRITON_INTERPRET=1"
    ):
        TRITON.nf4_matmul(torch.zeros(2, 64), weight)
    with pytest.raises(ValueError, match="weight must be on a CUDA device, got cpu"):
        TRITON.nf4_dequantize(weight)
