"""Many small arrays in one copy: a copy between host and device costs the same for one number as for thousands."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 4  # elements, at least 16 bytes: Triton compiles a kernel anew for a pointer that is less aligned


def to_device(
    arrays: Sequence[np.ndarray], device: torch.device, into: Tensor | None = None
) -> list[Tensor]:
    """Copy ``arrays`` (N,) of one dtype to ``device`` at once, without waiting for it; return a view of each.

    They go to ``into``, if given, which an earlier call with as long arrays has made (the storage of its views).
    """
    starts = [0, *np.cumsum([-(-len(array) // _ALIGNMENT) * _ALIGNMENT for array in arrays])]
    dtype = torch.from_numpy(arrays[0]).dtype
    joined = torch.empty(int(starts[-1]), dtype=dtype, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=False):
        joined[start : start + len(array)] = torch.from_numpy(array)
    if into is None:
        there = joined.to(device, non_blocking=True)
    else:
        there = into.copy_(joined, non_blocking=True)
    return [there[start : start + len(a)] for start, a in zip(starts, arrays, strict=False)]


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy ``tensors`` of any shapes, int32 or fp32, from their device at once, and wait for them."""
    bits = [tensor.contiguous().view(torch.int32).flatten() for tensor in tensors]
    joined = torch.cat(bits).cpu()
    parts = joined.split([len(part) for part in bits])
    return [
        part.view(tensor.dtype).numpy().reshape(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
