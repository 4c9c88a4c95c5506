"""The line of the progress bar."""

import time

import pytest

from idefics2_engine.progress_bar import Progress
from idefics2_engine.runtime.stats import EngineStats


def test_rates_count_from_the_beginning_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stats = EngineStats(
        computed_tokens=70, generated_tokens=7, encoded_tiles=3, cached_tokens=9, cached_tiles=1
    )
    stats.image_device_seconds = 5.0
    bar = Progress(stats, 8, False)
    assert bar.rates() == ("in 0 tok/s, out 0 tok/s, 0.0 tiles/s, cached 0% tok 0% tiles, KV 0%")
    now[0] += 10
    stats.computed_tokens += 400
    stats.generated_tokens += 100
    stats.encoded_tiles += 15
    stats.cached_tokens += 100
    stats.cached_tiles += 5
    stats.cache_usage = 0.5
    done = "in 30 tok/s, out 10 tok/s, 1.5 tiles/s, cached 25% tok 25% tiles, KV 50%"
    assert bar.rates() == done
    stats.decode_device_seconds += 4
    stats.text_device_seconds += 2
    stats.image_device_seconds += 1.5
    assert bar.rates() == f"{done}, device waited 25%"
