"""Copies of tiles to the device, started where their pixels were written if that is pinned."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.images.tiling import Tile

Pixels = npt.NDArray[np.uint8]


class PixelUploader:
    """Packs the pixels of tiles on ``device`` without waiting for their copies.

    Worker processes write pixels to pinned memory, which is written again as soon as the last
    reference to its tile is gone. A copy may be underway at that time, so the uploader holds the
    tiles until an event after the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._leaving: deque[tuple[torch.cuda.Event, list[Tile]]] = deque()

    def upload(self, tiles: Sequence[Tile], into: Tensor | None = None) -> Tensor:
        """Return the pixels of whole patches, tile by tile, (P * patch_size**2 * 3,) uint8.

        Args:
            tiles: The tiles, at least one.
            into: uint8 storage on the device of at least that size, to reuse.
        """
        arrays = [tile.patch_pixels().reshape(-1) for tile in tiles]
        size = sum(map(len, arrays))
        if self._device.type != "cuda":
            packed = torch.from_numpy(np.concatenate(arrays))
            return packed if into is None else into[:size].copy_(packed)
        if into is None:
            into = torch.empty(size, dtype=torch.uint8, device=self._device)
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()
        begin, held = 0, []
        # Neighbors that are not pinned are copied to pinned memory and leave together
        staged: list[Pixels] = []
        for tile, array in zip(tiles, arrays, strict=True):
            pinned = pinned_tensor(array)
            if pinned is None:
                staged.append(array)
                continue
            begin += _upload_staged(staged, into[begin:])
            into[begin : begin + len(array)].copy_(pinned, non_blocking=True)
            begin += len(array)
            held.append(tile)
        _upload_staged(staged, into[begin:])
        if held:
            has_left = torch.cuda.Event()
            has_left.record(torch.cuda.current_stream(self._device))
            self._leaving.append((has_left, held))
        return into[:size]


def pinned_tensor(array: Pixels) -> Tensor | None:
    """Return a 1-D ``array`` as a tensor if its memory is pinned, otherwise ``None``."""
    view = array.view()
    try:
        # PyTorch warns about arrays that are read-only. This is one only by a flag of its own
        view.setflags(write=True)
    except ValueError:
        return None
    tensor = torch.from_numpy(view)
    return tensor if tensor.is_pinned() else None


def _upload_staged(staged: list[Pixels], into: Tensor) -> int:
    """Copy arrays to the beginning of ``into`` through pinned memory; return their bytes."""
    if not staged:
        return 0
    size = sum(map(len, staged))
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    np.concatenate(staged, out=buffer.numpy())
    into[:size].copy_(buffer, non_blocking=True)
    staged.clear()
    return size
