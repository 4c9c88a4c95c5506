"""The encoding of images as CUDA graphs.

The vision tower has a graph for each of a few numbers of patches, which also computes the keys and
values of the perceiver's layers. The perceiver has a graph for each of a few numbers of images,
which stores the embeddings in the encoder cache. The two parts are separate, because a graph for
each pair of sizes would be too many.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import packed_length, to_device
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.cuda_graphs import GraphPool, next_size, sizes_up_to
from idefics2_engine.runtime.pixel_upload import PixelUploader
from idefics2_engine.runtime.step_gate import StepGate

MAX_PATCHES = 16384
"""Most patches of a graph. Larger batches of images gain nothing and need more memory."""
MAX_IMAGES = 32
"""Most images of a graph."""
# Half of a step is padded on average
_PATCH_STEPS = [(2048, 128), (8192, 256), (MAX_PATCHES, 512)]
_IMAGE_STEPS = [(4, 1), (8, 2), (MAX_IMAGES, 4)]

# Batches that are launched and have not ended. About 1,000 launches may wait on a device, and a host
# that launches more spins: 0.46 s of CPU time for a second of the device, in place of 0.06
_MAX_RUNNING = 2

Encode = tuple[Tile, int]
"""A tile, and the entry of the encoder cache for its embeddings."""


class ImageGraphs:
    """CUDA graphs that encode images, all captured on construction.

    Args:
        model: Model on a CUDA device.
        config: Normalization of pixels.
        image_features: (entries + 1, latents, hidden) encoder cache that the graphs write. The last
            entry is overwritten by padding.
        max_patches: Most patches of a step. A larger tile is encoded without others.
        uploader: Copies pixels to the device.
        pool: Captures the graphs.
        gate: Opened while the engine's thread waits for an earlier batch.
    """

    def __init__(
        self,
        model: Idefics2,
        config: ImageConfig,
        image_features: Tensor,
        max_patches: int,
        uploader: PixelUploader,
        pool: GraphPool,
        gate: StepGate,
    ) -> None:
        self.model = model
        self.config = config
        self.image_features = image_features
        self.max_patches = max_graph_patches(max_patches, model.config.vision.grid)
        self.patch_sizes = patch_sizes(self.max_patches)
        self.image_sizes = image_sizes(min(MAX_IMAGES, self.max_patches))
        self.num_padded_patches = 0
        self._uploader = uploader
        self._gate = gate
        # The ends of the last batches. The thread sleeps while it waits for one
        self._running: deque[torch.cuda.Event] = deque()
        most, device = self.patch_sizes[-1], model.device
        self._pixels = torch.zeros(
            most * model.config.vision.patch_dim, dtype=torch.uint8, device=device
        )
        # The sizes of a batch precede its positions, so they have the same place for every size
        sizes = self._sizes([])
        self._inputs = torch.zeros(packed_length(sizes) + most, dtype=torch.int32, device=device)
        *self._metadata, self._positions = to_device(
            [*sizes, np.zeros(most, np.int32)], device, self._inputs
        )
        perceiver = model.config.perceiver
        self._keys_values = [
            torch.zeros(
                (most, 2 * perceiver.num_kv_heads * perceiver.head_dim),
                dtype=model.dtype,
                device=device,
            )
            for _ in range(perceiver.num_layers)
        ]
        # The largest graph is captured first, and the others reuse its memory
        self._towers = {
            size: pool.capture(self._tower(size), warm_up=size == most)
            for size in reversed(self.patch_sizes)
        }
        self._perceivers = {
            size: pool.capture(self._perceiver(size), warm_up=size == self.image_sizes[-1])
            for size in reversed(self.image_sizes)
        }

    def run(self, encodes: Sequence[Encode]) -> None:
        """Encode tiles into their entries of the encoder cache, a batch at a time.

        Before a batch this waits for the end of the batch two before it.
        """
        for batch in batches(encodes, self.max_patches, self.image_sizes[-1]):
            self._run(batch)

    def _run(self, batch: Sequence[Encode]) -> None:
        tiles = [tile for tile, _ in batch]
        self._uploader.upload(tiles, self._pixels)
        positions = np.concatenate([tile.position_ids() for tile in tiles])
        size = next_size(self.patch_sizes, len(positions))
        # Padding patches need a valid position too
        padded = np.zeros(size, np.int32)
        padded[: len(positions)] = positions
        to_device([*self._sizes(batch), padded], self.model.device, self._inputs)
        self.num_padded_patches += size - len(positions)
        if len(self._running) == _MAX_RUNNING:
            with self._gate.opened():
                self._running.popleft().synchronize()
        self._towers[size].replay()
        self._perceivers[next_size(self.image_sizes, len(tiles))].replay()
        if self._pixels.device.type == "cuda":
            end = torch.cuda.Event(blocking=True)
            end.record()
            self._running.append(end)

    def _sizes(self, batch: Sequence[Encode]) -> list[np.ndarray]:
        """Return widths, offsets and entries of a batch, padded to one more than ``MAX_IMAGES``.

        Padding images have no patches. There is always one, to which padding patches belong.
        """
        images, padding = self.image_sizes[-1] + 1, len(self.image_features) - 1
        widths, entries = np.ones(images, np.int32), np.full(images, padding, np.int32)
        offsets = np.zeros(images + 1, np.int32)
        if batch:
            count = len(batch)
            widths[:count] = [tile.grid[1] for tile, _ in batch]
            entries[:count] = [entry for _, entry in batch]
            np.cumsum([tile.num_patches for tile, _ in batch], out=offsets[1 : count + 1])
            offsets[count + 1 :] = offsets[count]
        return [widths, offsets, entries]

    def _tower(self, size: int) -> Callable[[], None]:
        """Return the forward pass of the vision tower for ``size`` patches."""
        model, config = self.model, self.config
        widths, offsets, _ = self._metadata
        pixels = self._pixels[: size * model.config.vision.patch_dim]
        largest = min(size, model.config.vision.grid**2)

        def forward() -> None:
            patches = model.ops.patches(
                pixels,
                offsets,
                widths,
                model.config.vision.patch_size,
                config.rescale_factor,
                config.mean,
                config.std,
                model.dtype,
            )
            features = model.vision(patches, self._positions[:size], offsets, largest)
            for kept, own in zip(
                self._keys_values, model.connector.keys_values(features), strict=True
            ):
                kept[:size] = own

        return forward

    def _perceiver(self, images: int) -> Callable[[], None]:
        """Return the forward pass of the perceiver for a number of images."""
        model = self.model
        _, offsets, entries = self._metadata
        largest = min(self.max_patches, model.config.vision.grid**2)

        def forward() -> None:
            encoded = model.connector.perceiver(self._keys_values, offsets[: images + 1], largest)
            self.image_features[entries[:images]] = encoded

        return forward


def batches(encodes: Sequence[Encode], max_patches: int, max_images: int) -> Iterator[list[Encode]]:
    """Divide ``encodes``, in order, into batches of at most so many patches and images."""
    batch: list[Encode] = []
    patches = 0
    for tile, entry in encodes:
        if batch and (patches + tile.num_patches > max_patches or len(batch) == max_images):
            yield batch
            batch, patches = [], 0
        batch.append((tile, entry))
        patches += tile.num_patches
    if batch:
        yield batch


def max_graph_patches(max_patches: int, grid: int) -> int:
    """Return the most patches of a graph: at most ``MAX_PATCHES``, and at least the largest tile.

    Args:
        max_patches: Most patches of a step.
        grid: Trained positions per side, which bound a tile.
    """
    return max(min(max_patches, MAX_PATCHES), grid**2)


def patch_sizes(max_patches: int) -> list[int]:
    """Return the numbers of patches to capture, the last at least ``max_patches``."""
    *steps, (limit, step) = _PATCH_STEPS
    limit = max(limit, -(-max_patches // step) * step)
    return sizes_up_to(max_patches, [*steps, (limit, step)])


def image_sizes(max_images: int) -> list[int]:
    """Return the numbers of images to capture, the last at least ``max_images``."""
    return sizes_up_to(max_images, _IMAGE_STEPS)
