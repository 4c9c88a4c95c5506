"""The estimate of a job's time: from files of rates, with a spread, near the recorded jobs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from idefics2_bench.offline_workloads import offline_counts, offline_requests, tile_patches
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.plan.device_rates import Rates, Work, bound_seconds
from idefics2_engine.jobs.plan.time_estimate import DEFAULT_OVERHEAD, MeasuredRates
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from paths import EIGHT_B, ROOT

RESULTS = ROOT / "bench" / "results"
WORK = Work(Counter({1000: 8}), 5000, Counter({16: 10, 64: 10}), 8)


def row(kernel: str, case: str, ms: float, **counts: Any) -> dict[str, Any]:
    times = {"ms": ms, "ms_p20": 0.9 * ms, "ms_p80": 1.2 * ms}
    model = {"model": "small", "dtype": "float32"}
    return {"kernel": kernel, "case": case, "impl": "triton", **times, **model, **counts}


ROWS = [
    row("image", "image-980-b8", 80.0),
    row("prefill", "prefill-4096", 100.0, text_tokens=4096),
    row("step", "decode-b1", 4.0, batch=1),
    row("step", "decode-b32", 5.0, batch=32),
]


def write(path: Path, rows: list[dict[str, Any]], gpu: str = "one GPU") -> Path:
    path.write_text(json.dumps({"machine": {"gpu": gpu}, "rows": rows}))
    return path


def test_estimate_is_the_bound_with_overhead_and_spread(tmp_path: Path) -> None:
    rates = MeasuredRates.load([write(tmp_path / "rates.json", ROWS)], 14)
    parts = bound_seconds(WORK, Rates.from_rows(ROWS, 14))
    found = rates.estimate(WORK)
    assert (found.images, found.prompts, found.decode) == tuple(parts.values())
    bound = sum(parts.values())
    assert found.seconds == pytest.approx(DEFAULT_OVERHEAD.usual * bound)
    assert found.low == pytest.approx(0.9 * DEFAULT_OVERHEAD.low * bound)
    assert found.high == pytest.approx(1.2 * DEFAULT_OVERHEAD.high * bound)
    assert (found.machine, found.model) == ("one GPU", "small")
    assert found.to_dict()["formula"].startswith("patches x ")


def test_files_complete_each_other_and_the_last_one_counts(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", ROWS[:3])
    faster = [row("step", "decode-b32", 4.5, batch=32), row("step", "decode-b1", 2.0, batch=1)]
    second = write(tmp_path / "b.json", faster, "another GPU")
    rates = MeasuredRates.load([first, second], 14)
    assert rates.usual.steps == {1: 0.002, 32: 0.0045}
    assert rates.machine == "one GPU, another GPU"
    with pytest.raises(ConfigError, match=r"b\.json: must have rows .* 'image', got none"):
        MeasuredRates.load([second], 14)


def test_jobs_of_the_machine_replace_the_default_overhead(tmp_path: Path) -> None:
    jobs = [
        {
            "kernel": "offline",
            "case": f"offline-{number}",
            "impl": impl,
            "ms": 1.0,
            "requests_per_s": 10.0,
            "device_bound": {"requests_per_second": bound},
        }
        for number, (impl, bound) in enumerate(
            [("triton", 14.0), ("triton", 16.0), ("transformers", 90.0)]
        )
    ]
    rates = MeasuredRates.load([write(tmp_path / "rates.json", [*ROWS, *jobs])], 14)
    assert rates.overhead.usual == pytest.approx(1.5)
    assert rates.overhead.low < 1.4 < 1.6 < rates.overhead.high


def test_quantized_models_need_their_own_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.json", ROWS)
    with pytest.raises(ConfigError, match="decode steps, quantized, and does not"):
        MeasuredRates.load([path], 14, "nf4")
    quantized = [{**one, "case": f"{one['case']}-nf4", "ms": one["ms"] / 2} for one in ROWS]
    write(path, [*ROWS, *quantized])
    assert MeasuredRates.load([path], 14, "nf4").usual.steps == {1: 0.002, 32: 0.0025}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"machine": {}, "rows": [1]}', '{"machine": 1, "rows": []}', "[" * 10**5],
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"rates\.json: must be a file that idefics2 bench wrote"):
        MeasuredRates.load([path], 14)
    with pytest.raises(ConfigError, match="cannot be read"):
        MeasuredRates.load([tmp_path / "none.json"], 14)


RECORDED = {
    "h100-offline.json": ("h100-latency.json",),
    "h200-offline.json": (
        "h200-latency-d1d3656.json",
        "h200-latency.json",
        "h200-latency-compiled.json",
    ),
}


@pytest.fixture(scope="module")
def recorded_work() -> Work:
    processor = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False)
    requests = offline_requests("mixed", processor, 256)
    counts = offline_counts(requests, processor)
    return Work(
        Counter(n for one in requests for size in one.sizes for n in tile_patches(size, processor)),
        counts.image_tokens + counts.text_tokens,
        Counter(one.max_tokens for one in requests),
        256,
    )


@pytest.mark.parametrize("offline", RECORDED)
def test_recorded_jobs_are_within_a_quarter_of_the_estimate(
    offline: str, recorded_work: Work
) -> None:
    rows = json.loads((RESULTS / offline).read_text())["rows"]
    (recorded,) = (
        one for one in rows if (one.get("impl"), one["case"]) == ("triton", "offline-256")
    )
    assert recorded["patches"] == recorded_work.patches
    assert recorded["new_tokens"] == sum(recorded_work.answers.elements())
    rates = MeasuredRates.load([RESULTS / name for name in RECORDED[offline]], 14)
    found, seconds = rates.estimate(recorded_work), recorded["ms"] / 1e3
    assert abs(found.seconds - seconds) < 0.25 * seconds
    assert found.low < seconds < found.high
    assert rates.model.startswith("idefics2-8b")
