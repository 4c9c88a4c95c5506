"""Small gray pictures of a case, for its heat maps."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from idefics2_engine.images.tiling import QUARTERS, split_boxes
from idefics2_engine.parity import stages
from idefics2_engine.parity.recording.dump import Recording

_PIXELS = 200
_JPEG_QUALITY = 60

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CasePicture:
    """A picture, and where its tiles are.

    Attributes:
        source: A gray JPEG file as a data URI, at most 200 pixels to a side.
        size: Width and height of the picture.
        tiles: Left, top, right and bottom of the patches of each tile, as shares of the picture.
    """

    source: str
    size: tuple[int, int]
    tiles: list[Box]


def case_pictures(recording: Recording, case: int) -> list[CasePicture]:
    """Return the pictures of a case; none if the recording is a digest or lacks image stages."""
    if not {stages.DECODE, stages.TILES} <= set(recording.order):
        return []
    parts = recording.parts(case, stages.DECODE)
    images = [part for part in parts if isinstance(part, Tensor)]
    tiles = [tuple(part.shape) for part in recording.parts(case, stages.TILES)]
    sizes = [(width // 3, height) for height, width in tiles]
    covered = _covered(sizes, recording.cases[case].grids)
    each = recording.cases[case].tiles_per_image
    return [
        _picture(image, covered[index * each : (index + 1) * each])
        for index, image in enumerate(images)
    ]


def _covered(
    sizes: list[tuple[int, int]], grids: list[tuple[int, int]]
) -> list[tuple[float, float]]:
    """Return the share of each tile's width and height that whole patches cover.

    A side of a tile is its patches and less than one more. So the least quotient of all sides is
    the side of a patch, unless all tiles are smaller than it has pixels.
    """
    quotients = [
        side // count
        for size, (rows, columns) in zip(sizes, grids, strict=True)
        for side, count in zip(size, (columns, rows), strict=True)
    ]
    patch = min(quotients, default=1)
    return [
        (columns * patch / width, rows * patch / height)
        for (width, height), (rows, columns) in zip(sizes, grids, strict=True)
    ]


def _picture(pixels: Tensor, covered: list[tuple[float, float]]) -> CasePicture:
    height = pixels.shape[0]
    array = pixels.numpy().reshape(height, -1, 3).astype(np.uint8)
    width = array.shape[1]
    whole = (0, 0, width, height)
    boxes = split_boxes(width, height) if len(covered) == QUARTERS + 1 else [whole]
    tiles = [
        (
            left / width,
            top / height,
            (left + (right - left) * across) / width,
            (top + (bottom - top) * down) / height,
        )
        for (left, top, right, bottom), (across, down) in zip(boxes, covered, strict=True)
    ]
    image = Image.fromarray(array).convert("L")
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return CasePicture(source, (width, height), tiles)
