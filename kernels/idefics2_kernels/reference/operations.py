"""Reference of products, norms, activations, rotary positions and patches, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from idefics2_kernels.reference.precision import widen


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (..., N)."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply GELU in the tanh form to the rounded result of ``linear``: (..., N)."""
    return gelu_tanh(linear(x, weight, bias))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide ``x`` (..., N) by its root mean square, round, and scale by ``weight`` (N,)."""
    wide = widen(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N) and return the ``rms_norm`` of the sum, and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` (..., N) to mean 0 and variance 1, scale by ``weight``, add ``bias`` (N,)."""
    wide = widen(x)
    centered = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return (centered * rstd * weight + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N) and return the ``layer_norm`` of the sum, and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """Split ``gate_up`` (..., 2F) into halves and return silu(gate) * up (..., F), rounded once."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply GELU in the tanh form to ``x`` (..., N) + ``bias`` (N,)."""
    wide = widen(x)
    if bias is not None:
        wide = wide + bias
    return torch.nn.functional.gelu(wide, approximate="tanh").to(x.dtype)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` (T, H, D) and ``k`` (T, H_KV, D) by their ``positions`` (T,).

    ``cos_sin`` (positions, D) holds D/2 cosines, then D/2 sines. Column d is rotated together with
    column d + D/2, as in Llama.
    """
    cos, sin = (t[:, None, :] for t in widen(cos_sin)[positions].chunk(2, dim=-1))

    def rotate(x: Tensor) -> Tensor:
        first, second = widen(x).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    return rotate(q), rotate(k)


def rotary_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate ``q`` and ``k``, write ``k`` and ``v`` into the cache, and return ``q``.

    The rotation is that of ``rotary``. ``k`` and ``v`` are (T, H_KV, D). ``k_cache`` and
    ``v_cache`` (pages, H_KV, P, D) are written in place at ``slots`` (T,) = page * P + offset. A
    negative slot is padding: nothing is written for it.
    """
    q, k = rotary(q, k, positions, cos_sin)
    kept = slots >= 0
    page_size = k_cache.shape[2]
    pages, offsets = slots[kept] // page_size, slots[kept] % page_size
    k_cache[pages, :, offsets] = k[kept].to(k_cache.dtype)
    v_cache[pages, :, offsets] = v[kept].to(v_cache.dtype)
    return q


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
    whole patches. ``cu_seqlens`` (N + 1,) are the images' offsets in patches. ``widths`` (N,) is
    the number of patches in a row of each image. A value is
    (pixel * rescale_factor - mean[c]) / std[c] for each of C channels. The order within a patch row
    is channel, row, column.
    """
    C, s = len(mean), patch_size
    wide = torch.promote_types(dtype, torch.float32)
    center, spread = (
        torch.tensor(t, dtype=wide, device=pixels.device)[:, None] for t in (mean, std)
    )
    rows = []
    offsets = cu_seqlens.tolist()
    for begin, end, width in zip(offsets[:-1], offsets[1:], widths.tolist(), strict=True):
        if begin == end:
            continue
        image = pixels[begin * s * s * C : end * s * s * C].view(-1, s, width, s, C)
        rows.append(image.permute(0, 2, 4, 1, 3).reshape(end - begin, C, s * s))
    if not rows:
        return torch.zeros((0, C * s * s), dtype=dtype, device=pixels.device)
    values = (torch.cat(rows).to(wide) * rescale_factor - center) / spread
    return values.flatten(1).to(dtype)
