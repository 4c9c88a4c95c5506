"""Packed uint8 images to normalized patch rows.

A program computes all columns of a few patches. It finds a patch's image by a binary search in
``cu_seqlens`` on the device, so the host does not wait for the device. A thread loads all channels
of two neighboring pixels and stores two values for each channel. Compared with one value at a time,
this halves the loads, stores and instructions, which limit the kernel after memory.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import FLOATS, INTS, check_device, check_dtype, check_shape


@dataclass(frozen=True)
class LaunchConfig:
    """Patches of a program, and the warps that share them."""

    BLOCK_P: int
    num_warps: int


def launch_config(E: int) -> LaunchConfig:
    """Return the launch options for patches of ``E`` values."""
    # On an H100 the times for 2 to 8 patches and 1 to 4 warps are within 3 % of each other.
    return LaunchConfig(BLOCK_P=max(1, min(4, 8192 // E)), num_warps=4)


@triton.jit
def _byte(words, index: tl.constexpr):
    """Return a byte of each word in fp32.

    The bits of 2^23 + byte are assembled and 2^23 is subtracted. A conversion needs twice as many
    instructions.
    """
    byte = (words.to(tl.int32) >> (8 * index)) & 0xFF
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit(
    do_not_specialize=["P", "N", "steps"],
    do_not_specialize_on_alignment=["pixels_ptr", "cu_seqlens_ptr", "widths_ptr"],
)
def _patches_kernel(
    pixels_ptr,  # (P * S * S * C,) uint8
    cu_seqlens_ptr,  # (N + 1,)
    widths_ptr,  # (N,)
    out_ptr,  # (P, C * S * S)
    # In units of V. It is a run-time argument so that the compiler does not widen the stores, which
    # would spread each load over more rows of pixels.
    stride_out,
    scale,  # (C,)
    shift,  # (C,)
    P,
    N,
    # Steps of the search among N images.
    steps,
    C: tl.constexpr,
    S: tl.constexpr,
    # Pixels of a load.
    V: tl.constexpr,
    # Whether two pixels of three channels are read from aligned words of 32 bits.
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    E: tl.constexpr = C * S * S
    first_p = tl.program_id(0).to(tl.int64) * BLOCK_P
    offs_i = tl.arange(0, BLOCK_P)[:, None]
    offs_p = first_p + offs_i
    mask_p = offs_p < P

    # Find the last image that begins at or before each patch. An empty image begins where the next
    # one does, so the search passes it. Only empty images at the end are found, by patches of
    # padding after the last offset.
    image = tl.zeros([BLOCK_P, 1], dtype=tl.int32)
    end = image + N
    for _ in range(steps):
        middle = (image + end) // 2
        begins = tl.load(cu_seqlens_ptr + middle, mask=mask_p, other=0)
        image = tl.where(begins <= offs_p, middle, image)
        end = tl.where(begins <= offs_p, end, middle)
    local = (offs_p - tl.load(cu_seqlens_ptr + image, mask=mask_p, other=0)).to(tl.int32)
    width = tl.load(widths_ptr + image, mask=mask_p, other=1).to(tl.int32)
    # A row of ``width`` patches occupies the memory of ``width`` patches, and begins ``back``
    # patches before this one. Offsets from the program's first pixel fit into 32 bits.
    back = local % width
    corners, strides = (offs_i - back) * E + back * (S * C), width * (S * C)
    pixels_row, out_row = pixels_ptr + first_p * E, out_ptr + first_p * E

    # V neighboring pixels are C words of V bytes.
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    row, column = offs_w * V // S, offs_w * V % S
    mask_w = mask_p & (offs_w < S * S // V)
    if WIDE:
        # Two words of 32 bits hold the 6 bytes, which begin at byte 0 or 2 of the first word. Many
        # threads read a cache line, so the stores between their reads must not evict it.
        within = corners + row * strides + column * C
        word_ptrs = pixels_row.to(tl.pointer_type(tl.uint32)) + (within >> 2)
        low = tl.load(word_ptrs, mask=mask_w, other=0, eviction_policy="evict_last").to(tl.uint64)
        high = tl.load(word_ptrs + 1, mask=mask_w, other=0, eviction_policy="evict_last")
        high = high.to(tl.uint64)
        six = (low | high << 32) >> ((within & 2) * 8).to(tl.uint64)
        words = ((six & 0xFFFFFFFF).to(tl.uint32), (six >> 32).to(tl.uint32))
    else:
        word: tl.constexpr = tl.uint16 if V == 2 else tl.uint8
        # A shift halves the offsets, because a division of a signed number needs three
        # instructions.
        within = (corners >> V - 1) + row * (strides >> V - 1) + column // V * C
        word_ptrs = pixels_row.to(tl.pointer_type(word)) + within
        words = (tl.load(word_ptrs, mask=mask_w, other=0),)  # type: ignore[assignment]
        for w in tl.static_range(1, C):
            words += (tl.load(word_ptrs + w, mask=mask_w, other=0),)  # type: ignore[assignment]

    offs_s = tl.arange(0, BLOCK_W * V)[None, :]
    out_ptrs = out_row + (offs_i * (stride_out * V) + offs_s)
    mask_s = mask_p & (offs_s < S * S)
    # Bytes of a word.
    W: tl.constexpr = 4 if WIDE else V
    for c in tl.static_range(C):
        pixel = _byte(words[c // W], c % W)
        if V == 2:
            other = _byte(words[(C + c) // W], (C + c) % W)
            pixel = tl.reshape(tl.join(pixel, other), [BLOCK_P, BLOCK_W * V])
        out = tl.fma(pixel, scale[c], shift[c]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + c * S * S, out, mask=mask_s)


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
    """Turn packed uint8 images into normalized patch rows (P, C * patch_size**2) in ``dtype``.

    ``pixels`` (P * patch_size**2 * C,) holds each image's rows of pixels, channels last, cropped to
    whole patches. ``cu_seqlens`` (N + 1,) are the images' offsets in patches, from 0 to P.
    ``widths`` (N,) is the number of patches in a row of each image. A value is
    (pixel * rescale_factor - mean[c]) / std[c] for each of C channels, in fp32, rounded once.

    Raises:
        ValueError: A shape, stride or device does not fit, ``std`` has a zero, or ``std`` and
            ``mean`` differ in length.
        TypeError: ``pixels`` are not uint8, ``cu_seqlens`` or ``widths`` are not integers, or
            ``dtype`` is none of bf16, fp16, fp32.
    """
    C = len(mean)
    if len(std) != C or not C:
        raise ValueError(f"std must have as many values as mean, wanted {C}, got {len(std)}")
    if not all(std):
        raise ValueError(f"std must not be 0, got {tuple(std)}")
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
            f"pixels must be {E} bytes for each patch of {N} images, got {pixels.shape[0]} bytes"
        )
    out = torch.empty((P, E), dtype=dtype, device=pixels.device)
    if P:
        config = launch_config(E)
        pixels = pixels.contiguous()
        V = 2 if patch_size % 2 == 0 and pixels.data_ptr() % 2 == 0 else 1
        _patches_kernel[(triton.cdiv(P, config.BLOCK_P),)](
            pixels,
            cu_seqlens.contiguous(),
            widths.contiguous(),
            out,
            E // V,
            tuple(rescale_factor / s for s in std),
            tuple(-m / s for m, s in zip(mean, std, strict=True)),
            P,
            N,
            (N - 1).bit_length(),
            C=C,
            S=patch_size,
            V=V,
            WIDE=V == 2 and C == 3 and E % 4 == 0 and pixels.data_ptr() % 4 == 0,
            BLOCK_W=triton.next_power_of_2(patch_size**2 // V),
            **asdict(config),
        )
    return out
