"""The tiles of an image file: decoding, splitting and resizing by one set of rules.

A thread of the engine and a worker process run the same function.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from PIL import Image, ImageFile

from idefics2_engine.images.decoder import decode_with_info
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.tiling import ImageConfig, Tile, make_tiles


@dataclass(frozen=True)
class TileRules:
    """All that the tiles of a file depend on besides its bytes.

    Attributes:
        policy: What becomes of ambiguous images.
        max_pixels: Largest width x height of an image.
        image_config: Splitting and resizing.
        patch_size: Pixels per side of a patch.
        grid_side: Trained positions per side.
    """

    policy: ImagePolicy
    max_pixels: int
    image_config: ImageConfig
    patch_size: int
    grid_side: int

    @property
    def max_tile_bytes(self) -> int:
        """Bytes of the largest tile, whole patches only."""
        side = self.image_config.longest_edge // self.patch_size * self.patch_size
        return side * side * 3


@dataclass(frozen=True)
class PillowSwitches:
    """Settings of the process that change what Pillow reads.

    Attributes:
        load_truncated: ``ImageFile.LOAD_TRUNCATED_IMAGES``.
        max_pixels: ``Image.MAX_IMAGE_PIXELS``.
    """

    load_truncated: bool
    max_pixels: int | None

    @classmethod
    def current(cls) -> "PillowSwitches":
        """Return the settings of this process."""
        return cls(bool(ImageFile.LOAD_TRUNCATED_IMAGES), Image.MAX_IMAGE_PIXELS)

    def apply(self) -> None:
        """Make them the settings of this process."""
        ImageFile.LOAD_TRUNCATED_IMAGES = self.load_truncated
        Image.MAX_IMAGE_PIXELS = self.max_pixels


@dataclass(frozen=True, eq=False)
class FileTiles:
    """The tiles of an image, with whole patches only, and what is known of it."""

    tiles: Sequence[Tile]
    info: ImageInfo

    @property
    def num_bytes(self) -> int:
        """Bytes of all pixels."""
        return sum(tile.pixels.nbytes for tile in self.tiles)


def file_tiles(data: bytes, name: str, rules: TileRules) -> FileTiles:
    """Decode an image file and cut it into tiles of whole patches.

    Args:
        data: The file.
        name: What messages call it.
        rules: See ``TileRules``.

    Raises:
        ImageError: As in ``decoder.decode``.
    """
    tiles, info = decoded_tiles(data, name, rules)
    return FileTiles([tile.whole_patches() for tile in tiles], info)


def decoded_tiles(data: bytes, name: str, rules: TileRules) -> tuple[list[Tile], ImageInfo]:
    """Return the tiles as ``make_tiles`` does, and what is known of the file."""
    problems: list[str] = []
    image, info = decode_with_info(
        data, rules.policy, rules.max_pixels, name, lambda _name, problem: problems.append(problem)
    )
    tiles = make_tiles(image, rules.image_config, rules.patch_size, rules.grid_side)
    return tiles, replace(info, sha256=sha256(data).hexdigest(), warnings=tuple(problems))
