"""A progress bar with what the engine does a second."""

import time
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]

from idefics2_engine.runtime.stats import EngineStats


class Progress:
    """A bar over requests, on standard error.

    With ``is_shown`` false nothing is printed. Use as a context.
    """

    def __init__(self, stats: EngineStats, total: int | None, is_shown: bool) -> None:
        self._stats = stats
        self._begin = time.monotonic()
        self._tokens = stats.computed_tokens
        self._generated = stats.generated_tokens
        self._tiles = stats.encoded_tiles
        self._bar = tqdm(total=total, unit="request", disable=not is_shown, dynamic_ncols=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def update(self, finished: int) -> None:
        """Add ``finished`` requests, after a step of the engine."""
        self._bar.set_postfix_str(self.rates(), refresh=False)
        self._bar.update(finished)

    def rates(self) -> str:
        """Say what was done a second, on average since the beginning, and how full the cache is."""
        seconds = max(1e-9, time.monotonic() - self._begin)
        generated = self._stats.generated_tokens - self._generated
        computed = self._stats.computed_tokens - self._tokens
        tiles = self._stats.encoded_tiles - self._tiles
        return (
            f"in {(computed - generated) / seconds:.0f} tok/s, out {generated / seconds:.0f} tok/s, "
            f"{tiles / seconds:.1f} tiles/s, cache {self._stats.cache_usage:.0%}"
        )
