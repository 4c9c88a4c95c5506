"""A progress bar with what the engine does a second."""

import time
from dataclasses import replace
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]

from idefics2_engine.runtime.stats import EngineStats


class Progress:
    """A bar over requests, on standard error.

    With ``is_shown`` false nothing is printed. Use as a context.
    """

    def __init__(self, stats: EngineStats, total: int | None, is_shown: bool) -> None:
        self._stats = stats
        self._before = replace(stats)
        self._begin = time.monotonic()
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
        """Say what was done since the beginning.

        Tokens and tiles a second, the shares of prompt tokens and of tiles that came from a cache,
        the share of the KV cache in use now, and the share of time in which the device waited. The
        last is not known on a CPU.
        """
        now, before = self._stats, self._before
        seconds = max(1e-9, time.monotonic() - self._begin)
        generated = now.generated_tokens - before.generated_tokens
        prompts = now.computed_tokens - before.computed_tokens - generated
        tiles = now.encoded_tiles - before.encoded_tiles
        token_hits = now.cached_tokens - before.cached_tokens
        tile_hits = now.cached_tiles - before.cached_tiles
        text = (
            f"in {prompts / seconds:.0f} tok/s, out {generated / seconds:.0f} tok/s, "
            f"{tiles / seconds:.1f} tiles/s, "
            f"cached {_share(token_hits, prompts):.0%} tok {_share(tile_hits, tiles):.0%} tiles, "
            f"KV {now.cache_usage:.0%}"
        )
        busy = now.device_seconds - before.device_seconds
        return f"{text}, device waited {max(0.0, 1 - busy / seconds):.0%}" if busy else text


def _share(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits > 0 else 0.0
