"""Guarded memory for kernels: allocations full of NaN, between bands that must stay intact."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# Elements on each side
_BAND = 64
_FILL = {True: float("nan"), False: 0x5A}


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Fill each ``torch.empty`` and ``torch.empty_like`` with NaN; check the bands at the end."""
    buffers: list[Tensor] = []
    plain_empty = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        options.pop("memory_format", None)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = plain_empty(count + 2 * _BAND, **options)
        buffer.fill_(_FILL[buffer.is_floating_point()])
        buffers.append(buffer)
        return buffer[_BAND : _BAND + count].view(shape)

    def empty_like(tensor: Tensor, **options: Any) -> Tensor:
        options = {"dtype": tensor.dtype, "device": tensor.device} | options
        return empty(tuple(tensor.shape), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for buffer in buffers:
        for band in (buffer[:_BAND], buffer[-_BAND:]):
            untouched = band.isnan() if buffer.is_floating_point() else band == _FILL[False]
            assert untouched.all(), "a kernel wrote outside its output"
