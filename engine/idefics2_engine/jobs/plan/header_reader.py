"""A reader that makes tiles without pixels from the headers of images.

It takes the place of the engine's ``ImageReader``, so that a plan prepares rows with the engine's
own code and gets the same tiles, tokens and errors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import FileTiles
from idefics2_engine.images.header import ImageHeader, read_header
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.loader import ImageSource
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.images.sources.source_check import SourceCheck
from idefics2_engine.images.tiling import ImageConfig, Tile, tile_sizes
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.prompts.processor import Processor

# Tiles of files that rows name are made once, as long as so many are kept
_KEPT_FILES = 1 << 13
# Headers of files that many rows name are read once, as long as so many are kept
_KEPT_HEADERS = 1 << 16
_LONGEST_NAME = 4096
# Sizes of images whose tiles are kept, which have no pixels in memory
_KEPT_SIZES = 4096
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
    _headers: dict[str | Path, ImageHeader] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: Processor, check: ImageCheck) -> Self:
        """Return a reader by the rules of ``processor``."""
        return cls(processor.media, processor.tile_rules, FileCache(), check=check)

    def read(self, source: ImageSource, *, in_worker: bool = False) -> FileTiles:
        """Return the tiles of one image, without pixels, and the size that they are made for.

        Raises:
            ImageError: As in ``header.read_header``.
        """
        if type(source) is str and len(source) <= _LONGEST_NAME:
            return self._read_named(source)
        return self._read(source)

    @cached_property
    def _read_named(self) -> Callable[[str], FileTiles]:
        return lru_cache(_KEPT_FILES)(self._read)

    def _read(self, source: ImageSource) -> FileTiles:
        header = self._header(source)
        if header is not None:
            return self._make(Tile, header.size, header.fingerprint)
        # The whole and the quarters of an image of this size have the longest edges
        side = 2 * self.rules.image_config.longest_edge
        return self._make(UnreadTile, (side, side), _identity(source))

    @cached_property
    def _check_file(self) -> SourceCheck:
        return SourceCheck(self.media)

    def _header(self, source: ImageSource) -> ImageHeader | None:
        if self.check is not ImageCheck.HEADER:
            if self.check is ImageCheck.EXISTS:
                self._check_file(source)
            return None
        # A data URI is long
        if not isinstance(source, str | Path) or len(str(source)) > _LONGEST_NAME:
            return read_header(source, self.media)
        header = self._headers.get(source) or read_header(source, self.media)
        if len(self._headers) >= _KEPT_HEADERS:
            self._headers.clear()
        if header is not None:
            self._headers[source] = header
        return header

    def _make(self, kind: type[Tile], size: tuple[int, int], name: bytes) -> FileTiles:
        rules = self.rules
        digest = blake2b(name, digest_size=15).digest()
        tiles = [
            kind(pixels, rules.patch_size, rules.grid_side, digest + bytes((place,)))
            for place, pixels in enumerate(_blank_tiles(size, rules.image_config))
        ]
        return FileTiles(tiles, ImageInfo(*size))


@lru_cache(_KEPT_SIZES)
def _blank_tiles(size: tuple[int, int], config: ImageConfig) -> list[npt.NDArray[np.uint8]]:
    return [
        np.ndarray((height, width, 3), np.uint8, _ZERO, strides=(0, 0, 0))
        for width, height in tile_sizes(size, config)
    ]


def _identity(source: ImageSource) -> bytes:
    """Return bytes that equal names and equal bytes share."""
    if isinstance(source, Mapping):
        source = next((one for one in source.values() if one is not None), b"")
    return source if isinstance(source, bytes) else str(source).encode(errors="surrogatepass")
