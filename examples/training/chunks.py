"""The unit of work of a data worker: pixels of scenes, and conversations grouped by shape.

Pixels are written to a room, which is memory that the trainer shares with its workers. Only a few
small arrays are sent between processes, so the trainer spends almost no Python time on a
conversation.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from conversations import Grid, Preparer, Tokens
from questions import ALL_KINDS, Conversation
from scenes import Scene

# The grids of an image's five tiles
Grids = tuple[Grid, ...]
Bytes = npt.NDArray[np.uint8]

# Sequences are padded to a multiple of this
_LENGTH_STEP = 32
_PAD = 0


@dataclass(frozen=True, order=True)
class GroupKey:
    """The shape that all conversations of a group share."""

    grids: Grids
    num_images: int
    split: bool
    length: int  # tokens, padded


@dataclass(frozen=True, eq=False)
class Rows:
    """Conversations of one group."""

    kinds: npt.NDArray[np.int8]  # (N,) places in ALL_KINDS
    ids: npt.NDArray[np.int16]  # (N, length)
    answers: npt.NDArray[np.bool_]  # (N, length)
    scenes: npt.NDArray[np.int64]  # (N, images): indices of the chunk's scenes with these grids


@dataclass(frozen=True, eq=False)
class Chunk:
    """Scenes, whose pixels are stored one after another in a room, and conversations about them."""

    # Number of scenes for each list of grids, in the room's order
    scenes: dict[Grids, int]
    rows: dict[GroupKey, Rows]

    def pixels(self, room: Bytes, patch_size: int) -> dict[Grids, Bytes]:
        """Return views of ``room``, (scenes, bytes) for each of the tiles' grids."""
        views, begin = {}, 0
        for grids, count in self.scenes.items():
            each = sum(tile_bytes(grid, patch_size) for grid in grids)
            views[grids] = room[begin : begin + count * each].reshape(count, each)
            begin += count * each
        return views


def tile_bytes(grid: Grid, patch_size: int) -> int:
    """Return the size of a tile's patches in bytes."""
    return grid[0] * grid[1] * patch_size**2 * 3


def runs(grids: Grids) -> list[tuple[Grid, int]]:
    """Return the grids of an image's tiles, each with its number of consecutive tiles."""
    return [(grid, len(list(run))) for grid, run in groupby(grids)]


class ChunkBuilder:
    """A builder that collects scenes by their tiles' grids, and conversations by their group."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._pixels: dict[Grids, list[Bytes]] = {}
        self._members: dict[GroupKey, list[tuple[int, Tokens, list[int]]]] = {}

    def add_scene(self, scene: Scene) -> tuple[Grids, int]:
        """Draw ``scene``; return the grids of its tiles and its row among scenes of those grids."""
        tiles = self._preparer.tiles(scene)
        grids = tuple(tile.grid for tile in tiles)
        rows = self._pixels.setdefault(grids, [])
        rows.append(np.concatenate([tile.patch_pixels().ravel() for tile in tiles]))
        return grids, len(rows) - 1

    def add(
        self,
        conversation: Conversation,
        rows: list[tuple[Grids, int]],
        splits: tuple[bool, ...] = (True, False),
    ) -> None:
        """Encode a conversation about the scenes at ``rows``, all of one size, split and whole."""
        kind = ALL_KINDS.index(conversation.kind)
        tokens = self._preparer.tokens(conversation)
        for split in splits:
            length = len(tokens.ids) + self._preparer.added(conversation.num_images, split)
            padded = -(-length // _LENGTH_STEP) * _LENGTH_STEP
            key = GroupKey(rows[0][0], conversation.num_images, split, padded)
            self._members.setdefault(key, []).append((kind, tokens, [row for _, row in rows]))

    def chunk(self, room: Bytes) -> Chunk:
        """Put the scenes into ``room`` (bytes,) and stack the conversations."""
        begin = 0
        for images in self._pixels.values():
            end = begin + sum(map(len, images))
            np.concatenate(images, out=room[begin:end])
            begin = end
        scenes = {grids: len(images) for grids, images in self._pixels.items()}
        return Chunk(scenes, {key: self._rows(key, of) for key, of in self._members.items()})

    def _rows(self, key: GroupKey, members: list[tuple[int, Tokens, list[int]]]) -> Rows:
        shape = len(members), key.length - self._preparer.added(key.num_images, key.split)
        stacked = Tokens(np.full(shape, _PAD, dtype=np.int16), np.zeros(shape, dtype=np.bool_))
        for row, (_, tokens, _) in enumerate(members):
            stacked.ids[row, : len(tokens.ids)] = tokens.ids
            stacked.answers[row, : len(tokens.ids)] = tokens.answers
        expanded = self._preparer.expanded(stacked, key.split)
        return Rows(
            kinds=np.array([kind for kind, _, _ in members], dtype=np.int8),
            ids=expanded.ids,
            answers=expanded.answers,
            scenes=np.array([places for _, _, places in members], dtype=np.int64),
        )
