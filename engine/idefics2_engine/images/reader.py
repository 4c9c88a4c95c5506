"""From image sources to the tiles of requests: files found by their bytes, workers for large jobs.

``LLM`` has one reader. ``Processor`` reads images without it, on its own, for training and
comparison.
"""

import itertools
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ImageWarning
from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import FileTiles, TileRules, file_tiles
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.loader import ImageSource, MediaConfig, load_image, named_bytes
from idefics2_engine.images.sources.source_forms import plain_source
from idefics2_engine.images.tiling import Tile, make_tiles
from idefics2_engine.images.workers.worker_pool import WorkerPool

# With fewer images a job is done before workers have helped
MANY_IMAGES = 32


@dataclass(frozen=True)
class ImageReader:
    """Makes tiles of whole patches for requests; thread-safe.

    Attributes:
        media: Rules for reading images.
        rules: Splitting and resizing.
        files: The tiles of files that were seen.
        workers: Processes for jobs of many images. ``None``: all images are read in threads.
    """

    media: MediaConfig
    rules: TileRules
    files: FileCache
    workers: WorkerPool | None = None

    @property
    def num_threads(self) -> int:
        """Threads that read images at once: one more than workers, so that none waits for a file."""
        workers = 0 if self.workers is None else self.workers.count
        return max(self.media.num_threads, workers + 1 if workers else 0)

    def job(self, num_images: int = 0) -> "ImageJob":
        """Begin a call that reads images, ``num_images`` of them at least."""
        return ImageJob(self, num_images)

    def tiles(self, source: ImageSource, *, in_worker: bool = False) -> list[Tile]:
        """Return the tiles of one image, as ``read`` does."""
        return list(self.read(source, in_worker=in_worker).tiles)

    def read(self, source: ImageSource, *, in_worker: bool = False) -> FileTiles:
        """Return the tiles of one image, and what is known of it.

        Args:
            source: See ``loader.load_image``.
            in_worker: Whether a worker process may decode a file, if there are any.

        Raises:
            ImageError: As in ``loader.load_image``, or a worker ended before it was done.
        """
        plain: Any = plain_source(source, self.media.max_media_bytes)
        if not isinstance(plain, str | bytes | Path):
            image, rules = load_image(plain, self.media), self.rules
            made = make_tiles(image, rules.image_config, rules.patch_size, rules.grid_side)
            return FileTiles([tile.whole_patches() for tile in made], ImageInfo(*image.size))
        name, data = named_bytes(plain, self.media)

        def decode() -> FileTiles:
            made = None
            if in_worker and self.workers is not None:
                made = self.workers.tiles(data, name, self.rules)
            return made or file_tiles(data, name, self.rules)

        found = self.files.get(data, self.rules, decode)
        for problem in found.info.warnings:
            warnings.warn(f"{name}: {problem}", ImageWarning, stacklevel=2)
        return found

    def close(self) -> None:
        """End the workers and forget all files; idempotent. Images can still be read."""
        if self.workers is not None:
            self.workers.close()
        self.files.clear()


class ImageJob:
    """The images of one call, which start the workers when they are many."""

    def __init__(self, reader: ImageReader, num_images: int) -> None:
        self.reader = reader
        self._count = itertools.count(1)
        if num_images >= MANY_IMAGES:
            self._start_workers()

    def read(self, source: ImageSource) -> FileTiles:
        """Return the tiles of one image, as ``ImageReader.read`` does."""
        if next(self._count) == MANY_IMAGES:
            self._start_workers()
        # An interrupt, which the main thread gets, must not part a worker from its job
        is_main = threading.current_thread() is threading.main_thread()
        return self.reader.read(source, in_worker=not is_main)

    def _start_workers(self) -> None:
        if self.reader.workers is not None:
            self.reader.workers.start()
