"""Splitting and resizing of images to uint8 tiles.

A tile is one input of the vision tower: a whole image or, with splitting, a quarter of one. The
pixels equal those of transformers' ``Idefics2ImageProcessorPil`` bit for bit.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_engine.errors import ImageError
from idefics2_engine.images.settings import image_settings
from idefics2_engine.json_file import Section

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part in pixels, the last two exclusive."""

# Splitting adds so many tiles before the whole image
QUARTERS = 4


@dataclass(frozen=True)
class ImageConfig:
    """A checkpoint's settings for the preparation of images."""

    longest_edge: int  # pixels
    shortest_edge: int  # pixels
    split: bool
    # Pillow's number of the filter, such as 2 for bilinear
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]  # (3,)
    std: tuple[float, ...]  # (3,)

    @classmethod
    def load(cls, folder: Path) -> "ImageConfig":
        """Read the settings in ``folder``.

        Raises:
            ConfigError: The settings are missing, unreadable, invalid or not supported.
        """
        return cls.from_settings(image_settings(folder))

    @classmethod
    def from_settings(cls, settings: Section) -> "ImageConfig":
        """Build from a checkpoint's settings, with transformers' defaults for missing ones.

        Raises:
            ConfigError: A setting is invalid, or turns off a step that Idefics2 needs.
        """
        values, fail = settings.values, settings.error

        def read(key: str, default: Any) -> Any:
            value = values.get(key)
            return default if value is None else value

        for step in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            if read(step, True) is not True:
                raise fail(step, "true", values[step])
        split = read("do_image_splitting", False)
        if type(split) is not bool:
            raise fail("do_image_splitting", "true or false", split)
        resample = read("resample", int(Image.Resampling.BILINEAR))
        if type(resample) is not int or resample not in list(Image.Resampling):
            raise fail("resample", "the number of a Pillow filter", resample)
        size = read("size", {"longest_edge": 980, "shortest_edge": 378})
        if (
            not isinstance(size, dict)
            or size.keys() != {"longest_edge", "shortest_edge"}
            or any(type(edge) is not int for edge in size.values())
            or not 0 < size["shortest_edge"] <= size["longest_edge"]
        ):
            raise fail("size", "0 < shortest_edge <= longest_edge in pixels", size)
        factor = read("rescale_factor", 1 / 255)
        if not _is_positive(factor):
            raise fail("rescale_factor", "a positive number", factor)
        mean = read("image_mean", [0.5, 0.5, 0.5])
        if not isinstance(mean, list) or [_is_number(m) for m in mean] != [True] * 3:
            raise fail("image_mean", "three numbers", mean)
        std = read("image_std", [0.5, 0.5, 0.5])
        if not isinstance(std, list) or [_is_positive(s) for s in std] != [True] * 3:
            raise fail("image_std", "three positive numbers", std)
        return cls(
            longest_edge=size["longest_edge"],
            shortest_edge=size["shortest_edge"],
            split=split,
            resample=resample,
            rescale_factor=float(factor),
            mean=tuple(float(m) for m in mean),
            std=tuple(float(s) for s in std),
        )

    @property
    def tiles_per_image(self) -> int:
        """Number of tiles per image."""
        return QUARTERS + 1 if self.split else 1


@dataclass(frozen=True, eq=False)
class Tile:
    """One resized image and the patches that the vision tower cuts it into."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    patch_size: int  # pixels per side
    grid_side: int  # trained positions per side
    known_fingerprint: bytes | None = None  # the fingerprint, if it was computed elsewhere

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, without patches that the image fills only in part."""
        height, width, _ = self.pixels.shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches, rows x columns."""
        rows, columns = self.grid
        return rows * columns

    @cached_property
    def fingerprint(self) -> bytes:
        """128-bit hash of sizes and pixels; tiles with the same hash have the same embeddings."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = blake2b(
            repr((self.grid, self.patch_size, self.grid_side)).encode(), digest_size=16
        )
        digest.update(self.patch_pixels().data)
        return digest.digest()

    def position_ids(self) -> npt.NDArray[np.int64]:
        """Return the trained position of each patch, (num_patches,), row by row.

        Raises:
            ImageError: The tile has more patches to a side than there are trained positions.
        """
        return position_ids(*self.grid, self.grid_side)

    def patch_pixels(self) -> npt.NDArray[np.uint8]:
        """Return the pixels of whole patches, contiguous, (rows * patch, columns * patch, 3)."""
        rows, columns = self.grid
        crop = self.pixels[: rows * self.patch_size, : columns * self.patch_size]
        return np.ascontiguousarray(crop)

    def whole_patches(self) -> "Tile":
        """Return the tile without pixels beyond whole patches, read-only, fingerprint computed.

        The engine needs no more, and its thread then packs the pixels without cutting them first.
        """
        pixels = self.patch_pixels()
        pixels.setflags(write=False)
        tile = Tile(pixels, self.patch_size, self.grid_side, self.known_fingerprint)
        # It is cached
        _ = tile.fingerprint
        return tile


def position_ids(rows: int, columns: int, grid_side: int) -> npt.NDArray[np.int64]:
    """Return the trained position of each patch of a tile, (rows * columns,), row by row.

    Raises:
        ImageError: The tile has more patches to a side than there are trained positions.
    """
    if max(rows, columns) > grid_side:
        raise ImageError(
            f"tile: at most {grid_side} x {grid_side} patches have a position, "
            f"got {rows} x {columns}"
        )
    return (_buckets(rows, grid_side)[:, None] * grid_side + _buckets(columns, grid_side)).ravel()


def resized_size(width: int, height: int, longest: int, shortest: int) -> tuple[int, int]:
    """Return the (width, height) in pixels that an image is resized to, as in transformers.

    If the longer side is above ``longest``, it shrinks to ``longest`` and the other side in
    proportion, rounded down. Then a side below ``shortest`` grows to ``shortest`` on its own, which
    may change the aspect ratio.
    """
    # Integer arithmetic would round differently from transformers
    aspect = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, shortest), max(height, shortest)


def split_boxes(width: int, height: int) -> list[Box]:
    """Return the top left, top right, bottom left and bottom right quarters, then the whole.

    The cuts are at half the width and half the height, rounded down. If an image is one pixel wide
    or high, both sides of that cut are the one pixel. Otherwise quarters would be empty, on which
    transformers raises ``ZeroDivisionError``.
    """
    lefts = (0, max(width // 2, 1)), (min(width // 2, width - 1), width)
    tops = (0, max(height // 2, 1)), (min(height // 2, height - 1), height)
    quarters = [(left, top, right, bottom) for top, bottom in tops for left, right in lefts]
    return [*quarters, (0, 0, width, height)]


def tile_sizes(size: tuple[int, int], config: ImageConfig) -> list[tuple[int, int]]:
    """Return (width, height) of each tile that ``make_tiles`` makes of an image of ``size``."""
    return [
        resized_size(right - left, bottom - top, config.longest_edge, config.shortest_edge)
        for left, top, right, bottom in _boxes(size, config)
    ]


def make_tiles(
    image: Image.Image, config: ImageConfig, patch_size: int, grid_side: int
) -> list[Tile]:
    """Split an RGB image if ``config`` says so, and resize each part on its own.

    The tiles' pixels are read-only. Tiles of parts that keep their size share one array.
    """
    whole = (0, 0, *image.size)
    pixels: npt.NDArray[np.uint8] | None = None
    tiles = []
    sizes = tile_sizes(image.size, config)
    for box, size in zip(_boxes(image.size, config), sizes, strict=True):
        left, top, right, bottom = box
        if size == (right - left, bottom - top):
            if pixels is None:
                # Copying the pixels out of Pillow is slow, so it is done once
                pixels = np.asarray(image)
            part = pixels[top:bottom, left:right]
        else:
            # Resizing with box= would blend neighbors from across the cut
            cut = image if box == whole else image.crop(box)
            part = np.asarray(cut.resize(size, Image.Resampling(config.resample)))
        tiles.append(Tile(part, patch_size, grid_side))
    return tiles


def _boxes(size: tuple[int, int], config: ImageConfig) -> list[Box]:
    return split_boxes(*size) if config.split else [(0, 0, *size)]


def normalize(tile: Tile, config: ImageConfig) -> npt.NDArray[np.float32]:
    """Return a tile's pixels normalized for the vision tower, (3, H, W) float32.

    A channel has 256 possible values, so each is computed once. As in transformers, the rescaled
    value is a float64 product rounded to float32, and mean and deviation are applied in float32.
    """
    rescaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.mean, dtype=np.float32)
    std = np.array(config.std, dtype=np.float32)
    tables = (rescaled[:, None] - mean) / std  # (256, 3)
    values = np.empty((3, *tile.pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        table, pixels = tables[:, channel], tile.pixels[:, :, channel]
        # Every byte is a valid index, and "clip" skips the check of indices
        np.take(table, pixels, out=values[channel], mode="clip")
    return values


@cache
def _buckets(count: int, grid_side: int) -> npt.NDArray[np.int64]:
    """Return the trained position of each of ``count`` patches along one side, (count,).

    All is computed in float32 on the CPU, with the step itself rounded to float32. Other roundings
    move patches into a neighboring bucket, on a grid of 70 for counts of 25, 49, 50, 55 and 58.
    """
    # Only this function needs torch, so the other modules can be imported without it
    import torch

    # A caller may have changed torch's default device and dtype, so both are explicit
    with torch.device("cpu"):
        step = float(1 / torch.tensor(count, dtype=torch.float32))
        coordinates = torch.arange(0, 1 - 1e-6, step, dtype=torch.float32)
        boundaries = torch.arange(1 / grid_side, 1, 1 / grid_side, dtype=torch.float32)
    buckets = torch.bucketize(coordinates, boundaries, right=True).numpy()
    # All callers share this array
    buckets.setflags(write=False)
    return buckets


def _is_number(value: object) -> bool:
    # Python's integers have no limit, and the number must fit in float32
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e30


def _is_positive(value: Any) -> bool:
    return _is_number(value) and bool(value > 0)
