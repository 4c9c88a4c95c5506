"""The cases of ``bench latency`` by name."""

import pytest

from idefics2_bench.workloads import tiles
from idefics2_engine.jobs.plan.latency_case import LATENCY_CASES, SIZES, latency_case


def test_latency_cases_are_parsed_from_names() -> None:
    cases = [latency_case(name) for name in LATENCY_CASES]
    assert [(case.kernel, case.batch, case.length) for case in cases] == [
        ("step", 1, 200),
        ("step", 32, 200),
        ("step", 128, 200),
        ("image", 8, 0),
        ("image", 16, 0),
        ("image", 16, 0),
        ("prefill", 1, 4096),
        ("prefill", 1, 16384),
    ]
    whole, small, mixed = (case.sizes for case in cases if case.kernel == "image")
    assert (whole, small) == (((980, 980),) * 8, ((378, 504),) * 16)
    assert len(mixed) == 16
    assert len(set(mixed)) > 3
    assert set(mixed) <= set(SIZES)
    assert latency_case("image-mixed-b16").sizes == mixed
    assert latency_case("decode-b2-s64").length == 64
    assert sum(tile.num_patches for tile in tiles(cases[3], 14, 70)) == 8 * 4900
    for name in ("decode", "decode-b0", "image-980", "prefill-x", "image-mixed-b16-s2"):
        with pytest.raises(ValueError, match="case must be one like"):
            latency_case(name)
