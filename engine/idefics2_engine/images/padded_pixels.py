"""Tiles as one array, padded as transformers pads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from idefics2_engine.images.tiling import ImageConfig, Tile, normalize


def padded_pixels(
    rows: Sequence[Sequence[Tile]], config: ImageConfig
) -> dict[str, npt.NDArray[Any]]:
    """Return the tiles of B samples, at least one of them, padded on the right and bottom.

    Returns:
        ``pixel_values``, float32 (B, N, 3, H, W), and ``pixel_attention_mask``, int64 (B, N, H, W).
        N is the largest number of tiles of a sample; missing tiles are zero.
    """
    sizes = [tile.pixels.shape[:2] for row in rows for tile in row]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    shape = len(rows), max(len(row) for row in rows)
    pixels = np.zeros((*shape, 3, height, width), dtype=np.float32)
    mask = np.zeros((*shape, height, width), dtype=np.int64)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            h, w, _ = tile.pixels.shape
            pixels[i, j, :, :h, :w] = normalize(tile, config)
            mask[i, j, :h, :w] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}
