"""A reader that makes tiles without pixels from the headers of images.

It takes the place of the engine's ``ImageReader``, so that a plan prepares rows with the engine's
own code and gets the same tiles, tokens and errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np

from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import FileTiles
from idefics2_engine.images.header import ImageHeader, read_header
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.loader import ImageSource, check_source
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.images.tiling import Tile, tile_sizes
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.prompts.processor import Processor

# Files that many rows name are looked at once, as long as so many are kept
_KEPT_FILES = 1 << 16
_LONGEST_NAME = 4096
# All pixels are this byte
_ZERO = b"\0"


@dataclass(frozen=True, eq=False)
class UnreadTile(Tile):
    """A tile of an image whose header was not read, as large as tiles can be."""


@dataclass(frozen=True)
class HeaderReader(ImageReader):
    """Makes tiles of the sizes and patches that decoding would give.

    The pixels of its tiles are zeros without memory. Tiles of equal files have equal fingerprints.

    Attributes:
        check: What is looked at of an image. Images whose header is not read get tiles of the
            largest size, and so do those that would be downloaded.
    """

    check: ImageCheck = ImageCheck.HEADER
    _files: dict[str | Path, FileTiles] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: Processor, check: ImageCheck) -> Self:
        """Return a reader by the rules of ``processor``."""
        return cls(processor.media, processor.tile_rules, FileCache(), check=check)

    def read(self, source: ImageSource, *, in_worker: bool = False) -> FileTiles:
        """Return the tiles of one image, without pixels, and the size that they are made for.

        Raises:
            ImageError: As in ``header.read_header``.
        """
        # A data URI is long
        if not isinstance(source, str | Path) or len(str(source)) > _LONGEST_NAME:
            return self._read(source)
        found = self._files.get(source)
        if found is None:
            found = self._read(source)
            if len(self._files) >= _KEPT_FILES:
                self._files.clear()
            self._files[source] = found
        return found

    def _read(self, source: ImageSource) -> FileTiles:
        header = self._header(source)
        if header is not None:
            return self._make(Tile, header.size, header.fingerprint)
        # The whole and the quarters of an image of this size have the longest edges
        side = 2 * self.rules.image_config.longest_edge
        return self._make(UnreadTile, (side, side), _name_hash(source))

    def _header(self, source: ImageSource) -> ImageHeader | None:
        if self.check is ImageCheck.HEADER:
            return read_header(source, self.media)
        if self.check is ImageCheck.EXISTS:
            check_source(source, self.media)
        return None

    def _make(self, kind: type[Tile], size: tuple[int, int], name: bytes) -> FileTiles:
        rules = self.rules
        tiles = [
            kind(
                np.ndarray((height, width, 3), np.uint8, _ZERO, strides=(0, 0, 0)),
                rules.patch_size,
                rules.grid_side,
                blake2b(name, digest_size=16, salt=bytes([place])).digest(),
            )
            for place, (width, height) in enumerate(tile_sizes(size, rules.image_config))
        ]
        return FileTiles(tiles, ImageInfo(*size))


def _name_hash(source: ImageSource) -> bytes:
    """Return a hash that equal names and equal bytes share."""
    if isinstance(source, Mapping):
        source = next((one for one in source.values() if one is not None), b"")
    data = source if isinstance(source, bytes) else str(source).encode(errors="surrogatepass")
    return blake2b(data, digest_size=16).digest()
