"""NF4 against bitsandbytes, bit for bit, on a CPU: the reference, and kernels in small cases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from idefics2_kernels import TRITON, NF4Weight
from idefics2_kernels.nf4.nf4_weight import (
    can_stack,
    dynamic_bins,
    dynamic_code,
    nf4_code,
    split,
    stack,
)
from idefics2_kernels.reference import nf4 as reference_nf4
from idefics2_kernels.reference.nf4 import nf4_dequantize, nf4_matmul, nf4_quantize

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [
    (1,),
    (2,),
    (7,),
    (63,),
    (64,),
    (65,),
    (127,),
    (129,),
    (3, 21),
    (1, 130),
    (5, 72),
    (2, 3, 50),
]
LARGE = [(96, 257), (128, 64), (130, 1000), (255, 65), (257, 64), (16, 1024), (4096, 63), (1000, 999), (3, 5, 7, 11), (72, 14336), (1152, 4304)]  # fmt: skip


def oracle(weight: Tensor, double_quant: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Return bitsandbytes' parts of ``weight``, and its dequantized values."""
    codes, state = bnb.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant
    )
    parts = {"codes": codes.view(-1), "absmax": state.absmax}
    if double_quant:
        parts |= {"offset": state.offset.expand_as(state.state2.absmax)}
        parts |= {"nested_absmax": state.state2.absmax}
        parts |= {"nested_code": state.state2.code}
    # A flat shape of even length is needed, because its AVX-512 code expects rows of whole blocks
    state.shape = torch.Size([weight.numel() + weight.numel() % 2])
    # Its CUDA library on CPU tensors rounds ties away from zero in fp16. On CUDA tensors it flushes
    # small numbers to zero.
    if torch.cuda.is_available() and weight.dtype is torch.float16:
        codes = codes.cuda()
        state.to("cuda")  # type: ignore[no-untyped-call]
    values = bnb.dequantize_4bit(codes, state).view(-1)[: weight.numel()].view(weight.shape).cpu()
    return parts, values


def assert_equals_bitsandbytes(
    quantize: Callable[..., NF4Weight],
    dequantize: Callable[[NF4Weight], Tensor],
    weight: Tensor,
    double_quant: bool,
    device: torch.device = CPU,
) -> None:
    parts, values = oracle(weight, double_quant)
    ours = quantize(weight.to(device), double_quant=double_quant)
    assert ours.tensors.keys() == parts.keys()
    for name, part in parts.items():
        assert torch.equal(ours.tensors[name].cpu(), part), name
    back = dequantize(ours)
    assert back.dtype is weight.dtype
    assert torch.equal(back.cpu(), values)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
def test_reference_equals_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool
) -> None:
    weight = (torch.randn(shape) * 0.02).to(dtype)
    assert_equals_bitsandbytes(nf4_quantize, nf4_dequantize, weight, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_kernels_equal_bitsandbytes(
    shape: tuple[int, ...], double_quant: bool, device: torch.device
) -> None:
    if double_quant and device.type == "cuda":
        pytest.skip("PyTorch sums the mean of the absmaxes in another order there")
    for dtype in DTYPES:
        weight = (torch.randn(shape) * 0.02).to(dtype)
        kernels = TRITON.nf4_quantize, TRITON.nf4_dequantize
        assert_equals_bitsandbytes(*kernels, weight, double_quant, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_compiled_kernels_equal_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    weight = (torch.randn(shape) * 0.02).to(dtype)
    assert_equals_bitsandbytes(TRITON.nf4_quantize, TRITON.nf4_dequantize, weight, False, device)


def _zeros() -> Tensor:
    weight = torch.randn(4, 70)
    weight.view(-1)[64:128] = 0
    weight.view(-1)[256:] = 0
    return weight


def _ties() -> Tensor:
    code = nf4_code(CPU)
    middles = (code[:-1] + code[1:]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, side)) for side in (-2.0, 2.0)]
    block = torch.cat([torch.ones(1), middles, *near, code])[:64]
    block = torch.cat([block, torch.zeros(64 - block.numel())])
    return block * 2.0 ** torch.arange(-3, 4)[:, None]


HARD: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(3, 70),
    "zero-blocks": _zeros,
    "ties": _ties,
    "equal-blocks": lambda: torch.randn(1, 64).repeat(5, 1),
    "outlier": lambda: torch.randn(5, 64).index_fill_(0, torch.tensor(2), 6e4),
    "wide": lambda: torch.randn(300, 65) * 10.0 ** torch.linspace(-35, 35, 300)[:, None],
    "subnormal": lambda: torch.randn(3, 70) * 1e-38,
    # The mean of the four absmaxes must be finite
    "largest": lambda: torch.randn(3, 70).sign() * 8e37,
}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("values", HARD)
def test_hard_values_equal_bitsandbytes(
    values: str, double_quant: bool, device: torch.device
) -> None:
    weight = HARD[values]()
    assert_equals_bitsandbytes(nf4_quantize, nf4_dequantize, weight, double_quant)
    if weight.numel() < 1000 and not (double_quant and device.type == "cuda"):
        kernels = TRITON.nf4_quantize, TRITON.nf4_dequantize
        assert_equals_bitsandbytes(*kernels, weight, double_quant, device)


def test_nested_codes_equal_bitsandbytes_at_every_edge() -> None:
    """Test the 40 neighboring numbers on either side of every edge between two nested codes."""
    bins = dynamic_bins(CPU).long()
    edges = ((bins.diff().nonzero()[:, 0].double() + 0.5) / 65535 * 2 - 1).float()
    numbers = [edges]
    for side in (-2.0, 2.0):
        near = edges
        for _ in range(40):
            near = torch.nextafter(near, torch.full_like(near, side))
            numbers.append(near)
    rows = torch.cat(numbers).split(255)
    blocks = torch.stack([torch.cat([torch.ones(1), row]) for row in rows if len(row) == 255])
    codes, state = bnb.quantize_blockwise(blocks.view(-1), blocksize=256)
    ours, absmax = reference_nf4.quantize_absmax(blocks.view(-1))
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(ours, codes)


def test_rows_of_whole_blocks_equal_bitsandbytes_without_flattening() -> None:
    """bitsandbytes, called as its users call it, gives the same values for rows of whole blocks."""
    weight = torch.randn(48, 256, dtype=torch.bfloat16)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nf4_dequantize(nf4_quantize(weight)), bnb.dequantize_4bit(codes, state))


def test_tables_equal_bitsandbytes() -> None:
    assert torch.equal(nf4_code(CPU), bnb.get_4bit_type("nf4", device="cpu"))  # type: ignore[no-untyped-call]
    assert torch.equal(dynamic_code(CPU), bnb.create_dynamic_map())  # type: ignore[no-untyped-call]


def test_strides_do_not_matter() -> None:
    weight = torch.randn(6, 40).t()
    ours, plain = nf4_quantize(weight), nf4_quantize(weight.contiguous())
    assert torch.equal(ours.codes, plain.codes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_empty_weight_keeps_its_shape(double_quant: bool, device: torch.device) -> None:
    weight = torch.zeros(0, 64, device=device)
    for ops in (reference_nf4, TRITON):
        quantized = ops.nf4_quantize(weight, double_quant=double_quant)
        assert ops.nf4_dequantize(quantized).shape == (0, 64)


def test_product_does_not_round_float64() -> None:
    weight = nf4_quantize(torch.randn(5, 64, dtype=torch.bfloat16))
    x = torch.randn(3, 64, dtype=torch.float64)
    exact = nf4_matmul(x, weight)
    assert exact.dtype is torch.float64
    torch.testing.assert_close(exact, x @ nf4_dequantize(weight).double().t(), rtol=0, atol=1e-14)
    assert not torch.equal(exact, exact.float().double())


BAD_PARTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype must be"),
    "codes": ({"codes": torch.zeros(3, dtype=torch.uint8)}, ValueError, "codes must have shape"),
    "codes-dtype": ({"codes": torch.zeros(96)}, TypeError, "codes must be uint8"),
    "absmax": ({"absmax": torch.zeros(2, dtype=torch.uint8)}, ValueError, "absmax must have"),
    "absmax-dtype": ({"absmax": torch.zeros(3)}, TypeError, "absmax must be uint8"),
    "half-nested": ({"offset": None}, ValueError, "together or not at all"),
    "nested-code": ({"nested_code": torch.zeros(16)}, ValueError, "nested_code must have shape"),
    "offset-dtype": ({"offset": torch.zeros(1, dtype=torch.float64)}, TypeError, "offset must be"),
    "device": ({"offset": torch.zeros(1, device="meta")}, ValueError, "offset must be on cpu"),
    "strides": (
        {"codes": torch.zeros(192, dtype=torch.uint8)[::2]},
        ValueError,
        "codes must be contiguous",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    parts, error, message = BAD_PARTS[name]
    weight = nf4_quantize(torch.randn(3, 64))
    with pytest.raises(error, match=message):
        dataclasses.replace(weight, **parts)


@pytest.mark.parametrize("double_quant", [True, False])
def test_stacked_weights_equal_their_parts(double_quant: bool) -> None:
    parts = [nf4_quantize(torch.randn(n, 64) * n, double_quant=double_quant) for n in (256, 512, 3)]
    assert can_stack(parts)
    whole = stack(parts)
    assert whole.shape == (771, 64)
    assert torch.equal(nf4_dequantize(whole), torch.cat([nf4_dequantize(part) for part in parts]))
    for again, part in zip(split(whole, [256, 512, 3]), parts, strict=True):
        assert again.codes.untyped_storage().data_ptr() == whole.codes.data_ptr()
        assert again.shape == part.shape
        for name, tensor in part.tensors.items():
            assert torch.equal(again.tensors[name], tensor), name


def test_weights_that_cannot_be_stacked() -> None:
    whole, plain = (nf4_quantize(torch.randn(256, 64), double_quant=d) for d in (True, False))
    part = nf4_quantize(torch.randn(255, 64))
    other = dataclasses.replace(whole, nested_code=torch.linspace(-1, 1, 256))
    assert can_stack([whole, part])
    assert can_stack([nf4_quantize(torch.randn(3, 64), double_quant=False), plain])
    for pair in (
        # The first part ends inside a nested block
        [part, whole],
        # The first part ends inside a block
        [nf4_quantize(torch.randn(3, 63), double_quant=False)] * 2,
        [whole, plain],
        [whole, other],
        [whole, nf4_quantize(torch.randn(64, 256))],
        [whole, nf4_quantize(torch.randn(256, 64).half())],
        [nf4_quantize(torch.randn(16384))] * 2,
    ):
        assert not can_stack(pair)
