"""Conversion of images part by part, which bounds the memory of temporaries."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Part = tuple[slice, slice]
"""Rows and columns of an image."""

# The temporaries of a part of so many pixels stay in the CPU's cache
PART_PIXELS = 1 << 14


def parts(height: int, width: int) -> Iterator[Part]:
    """Yield the parts of an image of ``height`` x ``width`` pixels, cut across its longer side."""
    step = max(1, PART_PIXELS // max(1, min(height, width)))
    everything = slice(None)
    for begin in range(0, max(height, width), step):
        cut = slice(begin, begin + step)
        yield (cut, everything) if height >= width else (everything, cut)


def convert_in_parts(
    convert: Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]], pixels: npt.NDArray[Any]
) -> npt.NDArray[np.uint8]:
    """Return ``convert(pixels)`` of (H, W) pixels as (H, W) uint8, computed part by part.

    ``convert`` must treat each pixel independently of the others.
    """
    converted = np.empty(pixels.shape, np.uint8)
    height, width = pixels.shape
    for part in parts(height, width):
        converted[part] = convert(pixels[part])
    return converted
