"""Positions of each tile's embeddings in a prompt, on the host only."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from idefics2_engine.images.tiling import Tile


@dataclass(frozen=True, eq=False)
class ImageItem:
    """A tile and the tokens [``begin``, ``end``) of the prompt that its embeddings replace."""

    tile: Tile
    begin: int
    end: int


def image_items(
    token_ids: Sequence[int], tiles: Sequence[Tile], image_token_id: int, num_latents: int
) -> list[ImageItem]:
    """Find the placeholders of ``tiles``, each of ``num_latents`` consecutive image tokens."""
    places = [at for at, token in enumerate(token_ids) if token == image_token_id]
    assert len(places) == num_latents * len(tiles)
    firsts = places[::num_latents] if tiles else []
    items = [
        ImageItem(tile, first, first + num_latents)
        for tile, first in zip(tiles, firsts, strict=True)
    ]
    assert places == [at for item in items for at in range(item.begin, item.end)]
    return items


def items_between(items: Sequence[ImageItem], begin: int, end: int) -> Iterator[ImageItem]:
    """Yield, in order, the ``items`` that have a token in [``begin``, ``end``)."""
    first = bisect_right(items, begin, key=lambda item: item.end)
    last = bisect_left(items, end, key=lambda item: item.begin)
    yield from items[first:last]
