"""Memory layouts of inputs: plain, or a view into a buffer whose other elements are NaN."""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["plain", "sliced", "offset", "transposed", "far"]
# The layouts that are small enough for every machine.
LAYOUTS: tuple[Layout, ...] = ("plain", "sliced", "offset", "transposed")

# Fills memory that a kernel must not read.
POISON = float("nan")


def arrange(tensor: Tensor, layout: Layout) -> Tensor:
    """Return the values of ``tensor`` in another memory layout. All elements around them are NaN.

    - ``"sliced"``: columns of a wider buffer, like queries in a fused projection.
    - ``"offset"``: a buffer from an odd element on.
    - ``"transposed"``: the first two axes swapped in memory.
    - ``"far"``: entries of the first axis 2^30 elements apart, so that the offset of the third does
      not fit into 32 bits. It needs several GiB of a GPU's memory.
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
    """Draw normal numbers with standard deviation ``scale``, of ``shape`` and in ``layout``."""
    drawn = torch.randn(shape, dtype=torch.float32, device=device) * scale
    return arrange(drawn.to(dtype), layout)
