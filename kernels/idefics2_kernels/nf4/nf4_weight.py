"""A weight in 4-bit NormalFloat (NF4, Dettmers et al., 2023), and its tables.

The format is that of bitsandbytes. The weight is flattened and divided into blocks of 64 elements.
The last block may be shorter. A block has an absolute maximum (absmax). Each element is the absmax
times one of 16 fixed values, which a code of four bits selects. Double quantization stores the
absmax as a byte: absmax = nested_code[byte] * nested_absmax[block // 256] + offset.

A quantized tensor has one offset. Here each nested absmax has a copy of it. Tensors of whole nested
blocks can therefore be concatenated to one weight (``stack``), which one kernel multiplies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from idefics2_kernels.gpu.checks import FLOATS, check_dtype, check_shape
from idefics2_kernels.gpu.launch_barrier import launch_barrier

# Elements that share an absmax.
BLOCK = 64
# Absmaxes that share a nested absmax.
NESTED_BLOCK = 256
# Bins of [-1, 1] by which bitsandbytes finds the nearest nested code.
BINS = 65536

# Quantiles of a normal distribution, exact in fp32.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """One quantized tensor, in parts whose dtypes are fixed by the format.

    Attributes:
        codes: (ceil(elements / 2),) uint8, two codes per byte of the flattened weight, the first in
            the high nibble.
        absmax: (blocks,) fp32, or uint8 with double quantization.
        shape: Shape of the weight, (N, K) if it is multiplied.
        dtype: Dtype to dequantize to and to compute in: bf16, fp16 or fp32.
        offset: (ceil(blocks / 256),) fp32, the mean of a tensor's absmaxes. This and the next two
            are ``None`` without double quantization.
        nested_absmax: (ceil(blocks / 256),) fp32.
        nested_code: (256,) fp32, ascending.

    Raises:
        ValueError: A shape or device does not fit, or only some of the nested parts are given.
        TypeError: A part has another dtype.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype must be bfloat16 or float16 or float32, got {self.dtype}")
        blocks = -(-self.numel // BLOCK)
        check_shape("codes", self.codes, (-(-self.numel // 2),))
        check_dtype("codes", self.codes, torch.uint8)
        check_shape("absmax", self.absmax, (blocks,))
        nested_blocks = -(-blocks // NESTED_BLOCK)
        nested = {
            "offset": (self.offset, (nested_blocks,)),
            "nested_absmax": (self.nested_absmax, (nested_blocks,)),
            "nested_code": (self.nested_code, (256,)),
        }
        if len({part is None for part, _ in nested.values()}) > 1:
            raise ValueError(f"{', '.join(nested)} must be given together or not at all")
        check_dtype("absmax", self.absmax, torch.uint8 if self.is_nested else torch.float32)
        for name, (part, shape) in nested.items():
            if part is not None:
                check_shape(name, part, shape)
                check_dtype(name, part, torch.float32)
        for name, part in self.tensors.items():
            if part.device != self.device:
                raise ValueError(f"{name} must be on {self.device} as codes is, got {part.device}")
            if not part.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {part.stride()}")

    @property
    def numel(self) -> int:
        """The number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def is_nested(self) -> bool:
        """Whether the absmaxes are quantized too (double quantization)."""
        return self.offset is not None

    @property
    def absmax_parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Absmax, nested absmax, nested code and offset, in the order of the kernels' arguments."""
        return self.absmax, self.nested_absmax, self.nested_code, self.offset

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.codes.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts that are not ``None``, by name."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    def to(self, device: torch.device | str) -> "NF4Weight":
        """Return this weight with all parts on ``device``, without a copy if they are there."""
        moved = {name: part.to(device) for name, part in self.tensors.items()}
        is_same = all(moved[name] is part for name, part in self.tensors.items())
        return self if is_same else replace(self, **moved)  # type: ignore[arg-type]


def can_stack(weights: Sequence[NF4Weight]) -> bool:
    """Return whether the rows of ``weights`` (N_i, K) can be concatenated to one weight.

    All weights but the last must have whole (nested) blocks.
    """
    first = weights[0]
    whole = BLOCK * NESTED_BLOCK if first.is_nested else BLOCK
    kinds = {(len(w.shape), w.shape[-1:], w.dtype, w.is_nested, w.device) for w in weights}
    if len(kinds) > 1 or len(first.shape) != 2 or any(w.numel % whole for w in weights[:-1]):
        return False
    tables = [w.nested_code for w in weights if w.nested_code is not None]
    return all(torch.equal(table, tables[0]) for table in tables)


def stack(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Concatenate the rows of ``weights`` (N_i, K) to a new weight. ``can_stack`` must be true."""
    parts = {
        name: torch.cat([weight.tensors[name] for weight in weights])
        for name in weights[0].tensors
        if name != "nested_code"
    }
    rows = sum(weight.shape[0] for weight in weights)
    launch_barrier(weights[0].device)
    return replace(weights[0], shape=(rows, weights[0].shape[1]), **parts)  # type: ignore[arg-type]


def split(weight: NF4Weight, rows: Sequence[int]) -> list[NF4Weight]:
    """Split a stacked ``weight`` into weights of ``rows`` rows each, which share its memory."""
    parts, first = [], 0
    for count in rows:
        shape = (count, weight.shape[1])
        begin, end = first * shape[1], (first + count) * shape[1]
        blocks = slice(begin // BLOCK, -(-end // BLOCK))
        nested = slice(begin // BLOCK // NESTED_BLOCK, -(-end // (BLOCK * NESTED_BLOCK)))
        views = {"codes": weight.codes[begin // 2 : -(-end // 2)], "absmax": weight.absmax[blocks]}
        if weight.offset is not None and weight.nested_absmax is not None:
            views |= {
                "offset": weight.offset[nested],
                "nested_absmax": weight.nested_absmax[nested],
            }
        parts.append(replace(weight, shape=shape, **views))  # type: ignore[arg-type]
        first += count
    return parts


@cache
def nf4_code(device: torch.device) -> Tensor:
    """Return the 16 values of the codes, ascending: (16,) fp32."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def nf4_bounds(device: torch.device) -> Tensor:
    """Return the midpoints between the 16 values: (15,) fp32.

    A value equal to a midpoint gets the lower code.
    """
    code = torch.tensor(NF4_CODE, dtype=torch.float32)
    return ((code[:-1] + code[1:]) / 2).to(device)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 values of the dynamic 8-bit type (Dettmers, 2016), ascending: (256,) fp32.

    The seven decades up to 10^-6 .. 1 have 2^0 .. 2^6 evenly spaced values of either sign. The
    values 0 and 1 are added.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [means, -means]
    return torch.cat(values).sort().values.to(device)


@cache
def dynamic_bins(device: torch.device) -> Tensor:
    """Return the nearest dynamic code of 65536 evenly spaced numbers in [-1, 1]: (65536,) uint8."""
    code = dynamic_code(torch.device("cpu"))
    centers = -1.0 + (2.0 * torch.arange(BINS, dtype=torch.float32)) / (BINS - 1)
    return torch.bucketize(centers, 0.5 * (code[:-1] + code[1:])).to(torch.uint8).to(device)
