"""Weights from memory-mapped files to where the model has them."""

import torch
from torch import Tensor

_BUFFER_BYTES = 1 << 24
_BUFFERS = 4


class Uploader:
    """Copies to ``device``, rounded to the type of what they go to.

    A GPU reads pinned memory alone: the driver would take a mapped file's pages one after the other through memory of its
    own. Here all of PyTorch's threads take them into pinned buffers, of which some are on their way to the GPU meanwhile. On an
    H100 with 16 cores 16.8 GB from the page cache take 0.5 s in place of 2.2.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            self._buffers = [
                (torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                for _ in range(_BUFFERS)
            ]
        self._turn = 0

    def copy(self, source: Tensor, target: Tensor) -> Tensor:
        """Fill ``target``, contiguous and on the uploader's device, with ``source`` of as many elements; return it."""
        if not self._buffers or source.device.type != "cpu":
            return target.copy_(source.view(target.shape))
        elements = _BUFFER_BYTES // target.itemsize
        parts = source.reshape(-1).split(elements)
        for there, part in zip(target.view(-1).split(elements), parts, strict=True):
            buffer, has_left = self._buffers[self._turn % _BUFFERS]
            self._turn += 1
            has_left.synchronize()
            staged = buffer.view(target.dtype)[: len(part)].copy_(part)
            there.copy_(staged, non_blocking=True)
            has_left.record()
        return target
