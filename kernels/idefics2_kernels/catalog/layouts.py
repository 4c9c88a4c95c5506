"""How an input lies in memory.

It is plain, or a view into a buffer whose other elements must never be read.
"""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["plain", "sliced", "offset", "transposed", "far"]
LAYOUTS: tuple[Layout, ...] = ("plain", "sliced", "offset", "transposed")  # those of any machine

POISON = float("nan")


def arrange(tensor: Tensor, layout: Layout) -> Tensor:
    """Return ``tensor`` with its values in another place.

    ``"sliced"`` is every row of a wider buffer, as queries are in a fused projection; ``"offset"``
    begins in the middle of a buffer, an odd number of elements in; ``"transposed"`` has its first
    two axes swapped in memory. What surrounds the values is NaN. ``"far"`` puts 2^30 elements
    between the starts of entries of the first axis, so that from the third on 32 bits do not hold
    an offset: several GiB, for a GPU.
    """
    if layout == "plain" or not tensor.numel():
        return tensor
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 8), POISON)
        view = wide[..., 8 : 8 + tensor.shape[-1]]
    elif layout == "offset":
        flat = tensor.new_full((tensor.numel() + 26,), POISON)
        view = flat[13 : 13 + tensor.numel()].view(tensor.shape)
    elif layout == "far":
        size, inner = tensor.shape[0], tensor.shape[1:]
        flat = tensor.new_full(((size - 1) * 2**30 + inner.numel(),), POISON)
        view = flat.as_strided(tensor.shape, (2**30, *tensor[0].contiguous().stride()))
    else:
        if tensor.ndim < 3:
            raise ValueError(f"transposed needs three axes or more, got {tuple(tensor.shape)}")
        buffer = tensor.new_full((tensor.shape[1], tensor.shape[0] + 2, *tensor.shape[2:]), POISON)
        view = buffer[:, 1:-1].transpose(0, 1)
    view.copy_(tensor)
    return view


def normal(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = "plain",
    scale: float = 1.0,
) -> Tensor:
    """Draw N(0, ``scale``) numbers of ``shape`` in ``layout``."""
    drawn = torch.randn(shape, dtype=torch.float32, device=device) * scale
    return arrange(drawn.to(dtype), layout)
