"""Packing of pixels on the device."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from idefics2_engine.device import pin_memory
from idefics2_engine.images.tiling import Tile
from idefics2_engine.images.workers.shared_memory import SharedMemory
from idefics2_engine.model.batch import ImageBatch
from idefics2_engine.runtime.pixel_upload import PixelUploader, pinned_tensor

BYTES = 1 << 22


def tile(shape: tuple[int, int], seed: int) -> Tile:
    values = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Tile(values, 14, 70)


TILES = [tile(shape, seed) for seed, shape in enumerate([(28, 42), (14, 14), (30, 45), (70, 56)])]


def test_tiles_are_packed_as_in_a_batch(device: torch.device) -> None:
    uploader = PixelUploader(device)
    wanted = ImageBatch.from_tiles(TILES).pixels
    got = uploader.upload(TILES)
    assert (got.device.type, got.dtype) == (device.type, torch.uint8)
    assert torch.equal(got.cpu(), wanted)
    storage = torch.full((len(wanted) + 7,), 255, dtype=torch.uint8, device=device)
    got = uploader.upload(TILES, storage)
    assert got.data_ptr() == storage.data_ptr()
    assert torch.equal(got.cpu(), wanted)
    assert (storage[len(wanted) :] == 255).all()
    batch = ImageBatch.from_tiles(TILES, pixels=got).to(device)
    assert batch.pixels.data_ptr() == got.data_ptr()


def shared(device: torch.device) -> tuple[SharedMemory, Callable[[], None]]:
    memory = SharedMemory(BYTES)
    undo = pin_memory(device, memory.address, BYTES)
    assert undo is not None
    memory.add((0, BYTES))
    return memory, undo


def written(memory: SharedMemory, source: Tile) -> Tile:
    """Return the tile with its pixels in ``memory``."""
    pixels = source.patch_pixels()
    block = memory.take(pixels.nbytes)
    assert block is not None
    array = memory.owner(block).reshape(pixels.shape)
    array[:] = pixels
    array.setflags(write=False)
    return Tile(array, 14, 70)


@pytest.mark.gpu
def test_a_block_outlives_its_copy(device: torch.device) -> None:
    memory, undo = shared(device)
    uploader = PixelUploader(device)
    wanted = ImageBatch.from_tiles(TILES).pixels
    mixed: list[Any] = [written(memory, one) if at % 2 else one for at, one in enumerate(TILES)]
    assert pinned_tensor(mixed[1].patch_pixels().reshape(-1)) is not None
    assert pinned_tensor(mixed[0].patch_pixels().reshape(-1)) is None
    # The device begins with the copies long after the tiles are gone
    torch.cuda._sleep(10**9)
    got = uploader.upload(mixed)
    mixed.clear()
    while (block := memory.take(4096)) is not None:
        memory.array(block)[:] = 0
    assert torch.equal(got.cpu(), wanted)
    held = memory.num_free
    # They are released by the next call
    uploader.upload(TILES[:1])
    assert memory.num_free > held
    undo()
    memory.close()


@pytest.mark.gpu
def test_memory_can_be_pinned_once_and_again(device: torch.device) -> None:
    memory, undo = shared(device)
    one = written(memory, TILES[0])
    assert pin_memory(device, memory.address, BYTES) is None
    # The refusal is no error of what follows
    assert torch.equal(
        PixelUploader(device).upload([one]).cpu(), ImageBatch.from_tiles([one]).pixels
    )
    undo()
    assert pinned_tensor(one.pixels.reshape(-1)) is None
    again = pin_memory(device, memory.address, BYTES)
    assert again is not None
    again()
    memory.close()
