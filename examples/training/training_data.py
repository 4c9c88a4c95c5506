"""Training data on the device: tiles as uint8 and conversations as ids, grouped by shape.

In a batch every image has the same patch grids and every sequence the same padded length, so a
training step reads nothing back from the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunks import Bytes, Chunk, Grids, GroupKey, Rows, runs, tile_bytes
from conversations import Grid
from idefics2_engine.images.tiling import position_ids
from idefics2_engine.model.batch import TextBatch
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import IGNORED_LABEL


@dataclass(frozen=True, eq=False)
class Group:
    """Conversations of one shape."""

    key: GroupKey
    # (N,) on the host: indices into ALL_KINDS
    kinds: npt.NDArray[np.int8]
    ids: Tensor  # (N, length) int16
    answers: Tensor  # (N, length) bool
    scenes: Tensor  # (N, images) int64: rows of the pixels


@dataclass(frozen=True, eq=False)
class EqualTiles:
    """K tiles of one grid from each of N images."""

    grid: Grid
    pixels: Tensor  # (N, K, bytes a tile) uint8
    position_ids: Tensor  # (N * K * patches a tile,) int64
    cu_seqlens: Tensor  # (N * K + 1,) int32


# The group's key and the number of conversations
BatchShape = tuple[GroupKey, int]


@dataclass(frozen=True, eq=False)
class Batch:
    """B conversations of one group."""

    shape: BatchShape
    kinds: npt.NDArray[np.int8]  # (B,) on the host
    text: TextBatch
    labels: Tensor  # (B * length,) int64
    # Concatenated in this order they are the tiles of each image
    tiles: list[EqualTiles]

    @property
    def inputs(self) -> list[Tensor]:
        """Return all tensors that differ between batches of one shape."""
        return [self.text.input_ids, self.labels, *(tiles.pixels for tiles in self.tiles)]

    def clone(self) -> "Batch":
        """Return a copy of the batch with its own ``inputs``."""
        return replace(
            self,
            text=replace(self.text, input_ids=self.text.input_ids.clone()),
            labels=self.labels.clone(),
            tiles=[replace(tiles, pixels=tiles.pixels.clone()) for tiles in self.tiles],
        )


class DataSet:
    """Groups of conversations, and the pixels of their scenes."""

    def __init__(
        self, chunks: Iterable[tuple[Chunk, Bytes]], config: ModelConfig, device: torch.device
    ) -> None:
        """Copy ``chunks``, each with the room that holds its pixels, to ``device``."""
        self.device = device
        self._vision = config.vision
        pixels: dict[Grids, list[Tensor]] = {}
        counts: dict[Grids, int] = {}
        parts: dict[GroupKey, list[Rows]] = {}
        begins: dict[GroupKey, list[int]] = {}
        for chunk, room in chunks:
            for key, rows in chunk.rows.items():
                parts.setdefault(key, []).append(rows)
                begins.setdefault(key, []).append(counts.get(key.grids, 0))
            for grids, scenes in chunk.pixels(room, self._vision.patch_size).items():
                # The room is reused, so its content is copied
                copied = torch.from_numpy(scenes).to(device, copy=True)
                pixels.setdefault(grids, []).append(copied)
                counts[grids] = counts.get(grids, 0) + len(scenes)
        self.pixels = {grids: torch.cat(pixels.pop(grids)) for grids in list(pixels)}
        self.groups = [self._group(key, parts[key], begins[key]) for key in sorted(parts)]
        sizes = np.array([len(group.ids) for group in self.groups], dtype=np.float64)
        self.num_conversations = int(sizes.sum())
        self.num_scenes = sum(counts.values())
        self._shares = {}
        for split in (True, False):
            of_kind = sizes * [group.key.split == split for group in self.groups]
            self._shares[split] = of_kind / max(of_kind.sum(), 1.0)

    @property
    def num_bytes(self) -> int:
        """Return the size of all pixels in bytes."""
        return sum(pixels.nbytes for pixels in self.pixels.values())

    def draw(self, seed: int, step: int, size: int, split: bool) -> Batch:
        """Return the batch of ``step``.

        It depends on the number of the step alone, so a resumed run continues exactly.
        """
        rng = np.random.default_rng((seed, step))
        group = self.groups[rng.choice(len(self.groups), p=self._shares[split])]
        return self.batch(group, rng.integers(len(group.ids), size=size))

    def in_order(self, size: int) -> Iterator[Batch]:
        """Yield batches that contain every conversation once."""
        for group in self.groups:
            for start in range(0, len(group.ids), size):
                yield self.batch(group, np.arange(start, min(start + size, len(group.ids))))

    def batch(self, group: Group, members: npt.NDArray[np.int64]) -> Batch:
        """Gather ``members`` (B,) of ``group``."""
        key = group.key
        chosen = torch.from_numpy(members)
        if self.device.type == "cuda":
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)
        ids = group.ids[chosen].long()
        labels = torch.where(group.answers[chosen], ids, IGNORED_LABEL)
        positions, cu_seqlens = _sequence_layout(len(members), key.length, self.device)
        text = TextBatch(ids.flatten(), positions, cu_seqlens, key.length)
        # A patch has a multiple of four bytes, so it is gathered as words instead of bytes
        words = self.pixels[key.grids].view(torch.int32)
        pixels = words[group.scenes[chosen].flatten()].view(torch.uint8)
        tiles = self._equal_tiles(pixels, key)
        return Batch((key, len(members)), group.kinds[members], text, labels.flatten(), tiles)

    def _equal_tiles(self, pixels: Tensor, key: GroupKey) -> list[EqualTiles]:
        """Cut stacked images (N, bytes) into runs of tiles of one grid.

        Without splitting, only the whole image is used.
        """
        side = self._vision.patch_size
        cuts = runs(key.grids)
        parts = pixels.split([tile_bytes(grid, side) * n for grid, n in cuts], 1)
        if not key.split:
            grid = key.grids[-1]
            cuts, parts = [(grid, 1)], (pixels[:, -tile_bytes(grid, side) :],)
        tiles = []
        for (grid, n), part in zip(cuts, parts, strict=True):
            layout = _tile_layout(grid, n * len(part), self._vision.grid, self.device)
            tiles.append(EqualTiles(grid, part.unflatten(1, (n, -1)), *layout))
        return tiles

    def _group(self, key: GroupKey, parts: list[Rows], begins: list[int]) -> Group:
        """Join a group's conversations; ``begins`` has the first row of each chunk's scenes."""
        scenes = [part.scenes + begin for part, begin in zip(parts, begins, strict=True)]
        return Group(
            key=key,
            kinds=np.concatenate([part.kinds for part in parts]),
            ids=self._joined([part.ids for part in parts]),
            answers=self._joined([part.answers for part in parts]),
            scenes=self._joined(scenes),
        )

    def _joined(self, parts: Sequence[npt.NDArray[Any]]) -> Tensor:
        # PyTorch's copy releases the interpreter's lock, so other threads can run
        return torch.cat([torch.from_numpy(part) for part in parts]).to(self.device)


# Layouts are cached, because copying one to the device waits for the steps before


@cache
def _sequence_layout(size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return positions (size * length,) and offsets (size + 1,) of equal sequences."""
    return torch.arange(length).repeat(size).to(device), _equal_offsets(size, length).to(device)


@cache
def _tile_layout(
    grid: Grid, count: int, grid_side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return position ids (count * patches,) and offsets (count + 1,) of equal tiles."""
    rows, columns = grid
    ids = torch.from_numpy(position_ids(rows, columns, grid_side))
    return ids.repeat(count).to(device), _equal_offsets(count, rows * columns).to(device)


def _equal_offsets(count: int, length: int) -> Tensor:
    return torch.arange(0, (count + 1) * length, length, dtype=torch.int32)
