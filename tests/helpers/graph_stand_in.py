"""CUDA graphs without a GPU: a stand-in for ``GraphPool``, and reference operations with padding.

The kernels leave the rows of padding undefined. Here these rows are NaN, so a test shows that they
reach no result.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import REFERENCE


class StandInPool:
    """Runs the forward pass again where a graph would be replayed."""

    def __init__(self, device: torch.device) -> None:
        self.num_graphs = 0

    def capture(self, forward: Callable[[], None], *, warm_up: bool) -> "StandInGraph":
        """Return a graph that runs ``forward``."""
        self.num_graphs += 1
        return StandInGraph(forward)

    def finish(self) -> None:
        """Log nothing."""


class StandInGraph:
    """Has the method of a CUDA graph that replays it."""

    def __init__(self, forward: Callable[[], None]) -> None:
        self.replay = forward


def _padded(real: Tensor, rows: int) -> Tensor:
    out = real.new_full((rows, *real.shape[1:]), torch.nan)
    out[: len(real)] = real
    return out


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor:
    count = int(cu_seqlens[-1])
    if not count:
        return torch.full_like(q, torch.nan)
    out = REFERENCE.flash_attention(
        q[:count], k[:count], v[:count], cu_seqlens, max_seqlen, **options
    )
    return _padded(out, len(q))


def _paged_attention(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
    cu_seqlens = arguments[4]
    count = int(cu_seqlens[-1])
    return _padded(REFERENCE.paged_attention(q[:count], *arguments, **options), len(q))


def _patches(
    pixels: Tensor,
    cu_seqlens: Tensor,
    widths: Tensor,
    patch_size: int,
    rescale_factor: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    values = REFERENCE.patches(
        pixels, cu_seqlens, widths, patch_size, rescale_factor, mean, std, dtype
    )
    return _padded(values, len(pixels) // (patch_size**2 * len(mean)))


PADDED_REFERENCE = replace(
    REFERENCE,
    flash_attention=_flash_attention,
    paged_attention=_paged_attention,
    patches=_patches,
)
"""The reference, for inputs with padding as the graphs have them."""
