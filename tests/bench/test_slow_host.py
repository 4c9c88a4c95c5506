"""The estimate of a job on a host whose Python is slower."""

import pytest

from idefics2_bench.slow_host import seconds_at_loop


def test_slower_host_delays_only_steps_that_it_bounds() -> None:
    device = {"decode": 4.0, "text": 1.0, "image": 10.0}
    cpu = {"decode": 1.0, "text": 2.0, "image": 8.0}
    # Decode steps stay bound by the device, text steps were bound by the host before
    assert seconds_at_loop(20.0, device, cpu, 0.6, 1.2) == pytest.approx(20 + 0 + 2 + 6)
    assert seconds_at_loop(20.0, device, cpu, 1.2, 1.2) == pytest.approx(20)
    # A job never gets faster on a slower host, and may on a faster one
    assert seconds_at_loop(20.0, device, cpu, 1.2, 0.6) == pytest.approx(20 - 1)
