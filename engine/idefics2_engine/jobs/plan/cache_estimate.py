"""Which tokens and tiles of a job a cache will have, if rows run in the order of the input."""

from collections import OrderedDict
from collections.abc import Hashable

from idefics2_engine.jobs.plan.row_planner import PlannedRow, PlannedTile
from idefics2_engine.runtime.config import PAGE_SIZE


class RecentNames:
    """The names that were used last, at most ``most`` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: OrderedDict[Hashable, None] = OrderedDict()

    def use(self, name: Hashable) -> bool:
        """Make ``name`` the one used last; return whether it was there."""
        known = name in self._names
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._most:
            self._names.popitem(last=False)
        return known


class CacheEstimate:
    """The prefix cache and the encoder cache of the engine, as lists of names.

    Args:
        num_pages: Pages of the prefix cache; 0 is none.
        num_tiles: Tiles whose embeddings are kept.
    """

    def __init__(self, num_pages: int, num_tiles: int) -> None:
        self._pages = RecentNames(num_pages)
        self._tiles = RecentNames(num_tiles)

    def add(self, row: PlannedRow) -> tuple[int, list[PlannedTile]]:
        """Return the cached tokens of the next row's prompt, and the tiles to encode for it."""
        # A page is found only behind pages that are found
        known = [self._pages.use(name) for name in row.page_names]
        num_found = known.index(False) if False in known else len(known)
        cached = num_found * PAGE_SIZE
        rest = [tile for tile in row.tiles if tile.end > cached]
        return cached, [tile for tile in rest if not self._tiles.use(tile.name)]
