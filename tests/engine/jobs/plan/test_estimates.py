"""Distributions, caches and pages of a plan, compared with sorted values and simulations."""

import random
from statistics import median_low
from typing import Any

import pytest

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.plan.cache_estimate import CacheEstimate, RecentNames
from idefics2_engine.jobs.plan.distribution import Distribution
from idefics2_engine.jobs.plan.kv_estimate import KvEstimate
from idefics2_engine.runtime.config import PAGE_SIZE
from paths import DEMO
from pictures import file, noise
from planned_rows import job_rows, planner, question


def test_quantiles_are_values_by_nearest_rank() -> None:
    rng = random.Random(0)
    for count in (1, 2, 3, 19, 20, 21, 100, 101):
        values = [rng.randrange(50) for _ in range(count)]
        found = Distribution()
        for value in values:
            found.add(value)
        values.sort()
        assert found.to_dict() == {
            "total": sum(values),
            "min": values[0],
            "median": median_low(values),
            "p95": next(v for v in values if sum(w <= v for w in values) >= 0.95 * count),
            "max": values[-1],
        }
        for number in (0, 1, 5, 1000):
            assert found.largest_sum(number) == sum(sorted(values, reverse=True)[:number])
    assert Distribution().to_dict() == dict.fromkeys(("total", "min", "median", "p95", "max"), 0)


def test_values_may_be_counted_several_times() -> None:
    found = Distribution()
    found.add(3, 99)
    found.add(1000)
    assert (found.count, found.total) == (100, 1297)
    assert (found.quantile(95), found.quantile(99), found.quantile(100)) == (3, 3, 1000)


def test_the_name_used_longest_ago_is_forgotten() -> None:
    names = RecentNames(2)
    assert [names.use(name) for name in "abacbac"] == [
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert [names.use(name) for name in "cc"] == [True, True]
    nothing = RecentNames(0)
    assert not any(nothing.use("a") for _ in range(3))


def test_repeated_images_and_prefixes_are_cached() -> None:
    first, second = (file(noise(64, 64 + at), "PNG") for at in (0, 1))
    common = "word " * 150
    prompts = [
        question(common + "one", first),
        question(common + "two", first),
        question("short", first),
        question(common + "three", second),
        question(common + "one", first),
    ]
    planned = list(planner(DEMO, MediaConfig(), split=False).plan_batch(job_rows(prompts)))
    caches = CacheEstimate(num_pages=100, num_tiles=10)
    found = [caches.add(row) for row in planned]
    cached = [tokens for tokens, _ in found]
    full = (planned[0].num_prompt - 1) // PAGE_SIZE * PAGE_SIZE
    assert 2 * PAGE_SIZE <= cached[1] <= full
    assert (cached[0], cached[2], cached[3], cached[4]) == (0, 0, 0, full)
    assert [len(tiles) for _, tiles in found] == [1, 0, 0, 1, 0]
    # A tile whose tokens are found is not encoded, even if its embeddings are gone
    no_tiles = CacheEstimate(num_pages=100, num_tiles=0)
    assert [len(no_tiles.add(row)[1]) for row in planned] == [1, 0, 1, 1, 0]
    # Without caches everything is computed
    none = CacheEstimate(num_pages=0, num_tiles=0)
    assert [(tokens, len(tiles)) for tokens, tiles in map(none.add, planned)] == [(0, 1)] * 5


def sequences(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, most = rng.randrange(1, 400), rng.randrange(1, 300)
        made.append(
            {
                "prompt": prompt,
                "held": prompt,
                "max_tokens": most,
                "expected": rng.randrange(1, most + 1),
            }
        )
    return made


def simulated_peak(rows: list[dict[str, Any]], slots: int) -> int:
    """Run the schedule step by step and return the most pages at once."""
    waiting, peak = list(rows), 0
    running: list[list[int]] = []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([waiting[0]["held"], waiting.pop(0)["expected"]])
        running = [[tokens + 1, left - 1] for tokens, left in running]
        peak = max(peak, sum(-(-tokens // PAGE_SIZE) for tokens, _ in running))
        running = [one for one in running if one[1]]
    return peak


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_likely_peak_is_near_a_simulation_and_below_the_bound(slots: int) -> None:
    for seed in range(5):
        rows = sequences(seed, 300)
        found = KvEstimate(slots, None, 8192)
        for row in rows:
            found.add(**row)
        peak = simulated_peak(rows, slots)
        assert abs(found.likely() - peak) <= max(1, 0.06 * peak)
        assert found.likely() <= found.bound
        assert peak <= found.bound


def test_bound_is_reached_by_equal_sequences() -> None:
    found = KvEstimate(4, None, 8192)
    for _ in range(100):
        found.add(prompt=64, held=64, max_tokens=64, expected=64)
    assert found.bound == 8
    assert found.likely() == 8


def test_a_window_bounds_the_pages_of_a_sequence() -> None:
    found = KvEstimate(2, 1000, 512)
    found.add(prompt=30_000, held=30_000, max_tokens=100, expected=100)
    assert found.bound == -(-(1000 + 512 + PAGE_SIZE) // PAGE_SIZE)
    assert found.likely() <= found.bound


def test_several_answers_share_their_prompt() -> None:
    found = KvEstimate(8, None, 8192)
    found.add(prompt=6400, held=6400, max_tokens=64, expected=64, count=3)
    assert found.bound == 3 * 101
    assert found.likely() == pytest.approx(103, abs=3)
