"""Packed uint8 tiles to normalised patch rows: a program takes a few patches and all of their columns.

The tile that a patch belongs to is searched in ``cu_seqlens`` on the device, so that nothing is read back. Pixels are
gathered, C bytes apart since their channels are last, and the lines they lie in found again in the first-level cache
by the other channels and the neighbouring patches; rows are written in order. What a column is (channel, row and
column of the patch) is the same for all patches of a program.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.checks import FLOATS, INTS, check_device, check_dtype, check_shape


@dataclass(frozen=True)
class LaunchConfig:
    """Patches by columns of a tile, and the warps that share it."""

    block_p: int
    block_e: int
    num_warps: int


def _launch_config() -> LaunchConfig:
    # not measured yet; 588 columns fill 92 % of five blocks of 128
    return LaunchConfig(block_p=8, block_e=128, num_warps=4)


@triton.jit
def _patches_kernel(
    pixels_ptr,  # (P * S * S * C,) uint8
    cu_seqlens_ptr,  # (N + 1,)
    widths_ptr,  # (N,)
    out_ptr,  # (P, C * S * S)
    stride_out,  # at run time: a wider store would spread each gather over more rows of pixels
    rescale_factor,
    mean,  # C floats
    std,  # C floats
    P,
    N,
    steps,  # of the search among N tiles
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    E: tl.constexpr = C * S * S
    first_p = tl.program_id(0).to(tl.int64) * BLOCK_P
    offs_i = tl.arange(0, BLOCK_P)[:, None]
    offs_p = first_p + offs_i
    mask_p = offs_p < P

    # the last tile that begins at or before each patch: an empty one begins where the next does
    tile = tl.zeros([BLOCK_P, 1], dtype=tl.int32)
    end = tile + N
    for _ in range(steps):
        middle = (tile + end) // 2
        begins = tl.load(cu_seqlens_ptr + middle, mask=mask_p, other=0)
        tile = tl.where(begins <= offs_p, middle, tile)
        end = tl.where(begins <= offs_p, end, middle)
    local = (offs_p - tl.load(cu_seqlens_ptr + tile, mask=mask_p, other=0)).to(tl.int32)
    width = tl.load(widths_ptr + tile, mask=mask_p, other=1).to(tl.int32)
    # a row of patches holds the pixels of as many patches, and begins so many patches back; 32 bits hold what is
    # added to the program's first pixel
    back = local % width
    corners = (offs_i - back) * E + back * (S * C)
    pixels_row, out_row = pixels_ptr + first_p * E, out_ptr + first_p * stride_out

    for begin in range(0, E, BLOCK_E):
        offs_e = begin + tl.arange(0, BLOCK_E)[None, :]
        mask = mask_p & (offs_e < E)
        channel, row, column = offs_e // (S * S), offs_e // S % S, offs_e % S
        within = row * (width * (S * C)) + (column * C + channel)
        pixel = tl.load(pixels_row + (corners + within), mask=mask, other=0).to(tl.float32)
        centre = tl.zeros([1, BLOCK_E], dtype=tl.float32)
        spread = centre + 1.0
        for c in tl.static_range(C):
            centre = tl.where(channel == c, mean[c], centre)
            spread = tl.where(channel == c, std[c], spread)
        out = (pixel * rescale_factor - centre) * (1.0 / spread)
        out_ptrs = out_row + (offs_i * stride_out + offs_e)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def patches(
    pixels: Tensor,
    cu_seqlens: Tensor,
    widths: Tensor,
    patch_size: int,
    rescale_factor: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Turn packed uint8 tiles into normalised patch rows (P, C * patch_size**2) in ``dtype``.

    ``pixels`` (P * patch_size**2 * C,): each tile's rows of pixels, channels last, cropped to whole patches.
    ``cu_seqlens`` (N + 1,) counts patches from 0 to P, ``widths`` (N,) is each tile's number of patches in a row. A
    value is (pixel * rescale_factor - mean[c]) / std[c] for each of C channels, in fp32, rounded once.

    Raises:
        ValueError: A shape, stride or device does not fit, or ``std`` is not as long as ``mean``.
        TypeError: ``pixels`` are not uint8, counts are no integers, or ``dtype`` is none of bf16, fp16, fp32.
    """
    C = len(mean)
    if len(std) != C or not C:
        raise ValueError(f"std must have as many values as mean, wanted {C}, got {len(std)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    check_dtype("pixels", pixels, torch.uint8)
    check_dtype("cu_seqlens", cu_seqlens, *INTS)
    check_dtype("widths", widths, *INTS)
    check_shape("pixels", pixels, (None,))
    check_shape("widths", widths, (None,))
    N, E = widths.shape[0], C * patch_size**2
    check_shape("cu_seqlens", cu_seqlens, (N + 1,))
    check_device(pixels=pixels, cu_seqlens=cu_seqlens, widths=widths)
    P, rest = divmod(pixels.shape[0], E)
    if rest or (P and not N):
        raise ValueError(
            f"pixels must be {E} bytes for each patch of {N} tiles, got {pixels.shape[0]} bytes"
        )
    out = torch.empty((P, E), dtype=dtype, device=pixels.device)
    if P:
        config = _launch_config()
        _patches_kernel[(triton.cdiv(P, config.block_p),)](
            pixels.contiguous(),
            cu_seqlens.contiguous(),
            widths.contiguous(),
            out,
            out.stride(0),
            rescale_factor,
            tuple(float(value) for value in mean),
            tuple(float(value) for value in std),
            P,
            N,
            (N - 1).bit_length(),
            C=C,
            S=patch_size,
            BLOCK_P=config.block_p,
            BLOCK_E=config.block_e,
            num_warps=config.num_warps,
        )
    return out
