"""Positions of each tile's embeddings in a prompt, on the host only."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Encodable(Protocol):
    """What the vision tower encodes: a ``Tile``, or a ``Picture`` in patches."""

    @property
    def fingerprint(self) -> bytes:
        """Hash of the content."""

    @property
    def num_patches(self) -> int:
        """Number of patches."""


@dataclass(frozen=True, eq=False)
class ImageItem:
    """A tile and the tokens [``begin``, ``end``) of the prompt that its embeddings replace."""

    tile: Encodable
    begin: int
    end: int


def image_items(
    token_ids: Sequence[int], tiles: Sequence[Encodable], image_token_id: int, num_latents: int
) -> list[ImageItem]:
    """Find the placeholders of ``tiles``, each of ``num_latents`` consecutive image tokens."""
    items, end = [], 0
    for tile in tiles:
        begin = token_ids.index(image_token_id, end)
        end = begin + num_latents
        assert token_ids[begin:end].count(image_token_id) == num_latents
        items.append(ImageItem(tile, begin, end))
    assert token_ids.count(image_token_id) == num_latents * len(tiles)
    return items


def items_between(items: Sequence[ImageItem], begin: int, end: int) -> Iterator[ImageItem]:
    """Yield, in order, the ``items`` that have a token in [``begin``, ``end``)."""
    first = bisect_right(items, begin, key=lambda item: item.end)
    last = bisect_left(items, end, key=lambda item: item.begin)
    yield from items[first:last]
