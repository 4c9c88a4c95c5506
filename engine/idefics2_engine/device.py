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


class ToHost:
    """A copy of ``tensors`` of any shapes, int32 or fp32, from their device to the host, begun at once.

    Work that the device is given later need not be over before it has arrived.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        bits = [tensor.contiguous().view(torch.int32).flatten() for tensor in tensors]
        self._kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._lengths = [len(part) for part in bits]
        joined = torch.cat(bits)
        self._arrival: torch.cuda.Event | None = None
        if joined.device.type == "cuda":
            there = torch.empty(joined.shape, dtype=torch.int32, pin_memory=True)
            joined = there.copy_(joined, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()
        self._joined = joined

    def arrays(self) -> list[np.ndarray]:
        """Wait for the copy and return it, an array for each tensor."""
        if self._arrival is not None:
            self._arrival.synchronize()
        parts = self._joined.split(self._lengths)
        return [
            part.view(dtype).numpy().reshape(shape)
            for part, (dtype, shape) in zip(parts, self._kinds, strict=True)
        ]
