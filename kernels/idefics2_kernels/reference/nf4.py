"""Reference of the NF4 operations, in plain PyTorch: bit for bit bitsandbytes on a CPU.

The CUDA code of bitsandbytes quantizes differently in three places:

- The nested code is searched exactly there, and in bins here.
- A last block that is not full is multiplied by a reciprocal there, and divided here.
- Zeros in a block of zeros have another code.

All paths of bitsandbytes dequantize alike, except the one for AVX-512. That path assumes that
every row has a whole number of blocks.
"""

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import (
    BINS,
    BLOCK,
    NESTED_BLOCK,
    NF4Weight,
    dynamic_bins,
    dynamic_code,
    nf4_bounds,
    nf4_code,
)
from idefics2_kernels.reference.operations import linear

# The reciprocal of a smaller absmax would overflow.
_SMALLEST = 1e-38


def nf4_quantize(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """Quantize ``weight`` of any shape in blocks of 64.

    With ``double_quant`` the absmaxes are quantized too, in blocks of 256.
    """
    flat = weight.reshape(-1).float()
    full = flat.numel() // BLOCK * BLOCK
    blocks, rest = flat[:full].view(-1, BLOCK), flat[full:]
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, rest / last])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    scaled = scaled.clamp(-1, 1)
    codes = torch.bucketize(scaled, nf4_bounds(flat.device), out_int32=True).to(torch.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    shape = tuple(weight.shape)
    if not double_quant:
        return NF4Weight(packed, absmax, shape, weight.dtype)
    offset = absmax.mean()
    quantized, nested_absmax = quantize_absmax(absmax - offset)
    offsets = offset.repeat(nested_absmax.numel())
    nested_code = dynamic_code(flat.device)
    return NF4Weight(packed, quantized, shape, weight.dtype, offsets, nested_absmax, nested_code)


def quantize_absmax(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize ``centered`` (blocks,) to the dynamic code in blocks of 256.

    The result is the bytes (blocks,) and the absmax of each block of 256 (nested blocks,).
    """
    padding = -centered.numel() % NESTED_BLOCK
    blocks = torch.cat([centered, centered.new_zeros(padding)]).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.masked_fill(absmax == 0, 1.0))[:, None]).clamp(-1, 1)
    # Weights are expected to be finite. NaN becomes 0 so that the index stays inside the table.
    bins = ((scaled + 1.0) * 0.5 * (BINS - 1) + 0.5).nan_to_num().long()
    quantized = dynamic_bins(centered.device)[bins].masked_fill(absmax[:, None] == 0, 0)
    return quantized.view(-1)[: centered.numel()], absmax


def nf4_dequantize(weight: NF4Weight) -> Tensor:
    """Dequantize ``weight`` to a tensor of its shape and dtype.

    Products are fp32, rounded once.
    """
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).view(-1)[: weight.numel]
    absmax = weight.absmax
    if weight.offset is not None:
        assert weight.nested_absmax is not None
        assert weight.nested_code is not None
        nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        offset = weight.offset.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * nested + offset
    scales = absmax.repeat_interleave(BLOCK)[: weight.numel]
    values = nf4_code(weight.device)[codes.int()] * scales
    return values.view(weight.shape).to(weight.dtype)


def nf4_matmul(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (..., N).

    The weight is dequantized to its own dtype, which is the model's. ``x`` may be wider.
    """
    return linear(x, nf4_dequantize(weight).to(x.dtype), bias)
