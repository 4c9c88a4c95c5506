"""The benchmark's bookkeeping, on a CPU and with a fake clock."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from idefics2_bench import kernels, report
from idefics2_bench.timing import Call, Time, alternate, summary
from idefics2_kernels.catalog import CATALOG, Case, KernelSpec, rows

ABOUT = {
    "gpu": "a GPU",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "date": "today",
    "copy_TBps": 3.0,
    "matmul_TFLOPs": 700.0,
}


def fake_measure(calls: Mapping[str, list[Call]]) -> dict[str, Time]:
    """Make every call once; report 1 us for the kernels and 2 us for each peer."""
    for own in calls.values():
        for call in own:
            call()
    return {name: Time(*([1e-3 if name == "triton" else 2e-3] * 3)) for name in calls}


def small_case(name: str) -> tuple[KernelSpec, Case]:
    return next(
        (spec, case)
        for spec, _, case in rows("any")
        if spec.name == name and case.dtype is torch.float32 and spec.cost(case).bytes > 1000
    )


# bitsandbytes warns that it uses a slower path
@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")
@pytest.mark.parametrize("name", [spec.name for spec in CATALOG])
def test_case_is_checked_and_timed_beside_its_peers(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(kernels, "measure", fake_measure)
    spec, case = small_case(name)
    found = kernels.bench_case(spec, ["triton"], case, ABOUT, device, copies=2)
    ours = found[0]
    assert (ours["kernel"], ours["case"], ours["impl"]) == (name, case.name, "triton")
    assert 0 <= ours["error"] <= 1
    cost = spec.cost(case)
    assert ours["GBps"] == pytest.approx(cost.bytes / 1e-6 / 1e9)
    assert ours["TFLOPs"] == pytest.approx(cost.flops / 1e-6 / 1e12)
    shares = ours["GBps"] / 3000, ours["TFLOPs"] / 700
    assert ours["roofline"] == pytest.approx(max(shares))
    for peer in found[1:]:
        assert ours["peer"] in {row["impl"] for row in found[1:]}
        assert ours["speedup"] == pytest.approx(2.0)
        assert "speedup" not in peer


def test_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(kernels, "measure", fake_measure)
    spec, case = small_case("rms_norm")
    right = spec.implementations["triton"]
    broken = KernelSpec(
        **{
            **vars(spec),
            "implementations": {"triton": lambda **inputs: 1.01 * right(**inputs)},
        }
    )
    found = kernels.bench_case(broken, ["triton"], case, ABOUT, device, copies=1)
    assert found[0]["error"] > 1
    assert "ms" not in found[0]
    assert "WRONG" in report.line(found[0])
    assert "| wrong |" in report.table(ABOUT, found)


def test_results_are_stored_by_case_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    one = {"kernel": "k", "case": "a", "impl": "triton", "ms": 1.0}
    other = {"kernel": "k", "case": "b", "impl": "triton", "ms": 2.0}
    report.write_json(path, ABOUT, [one])
    report.write_json(path, ABOUT, [other])
    assert json.loads(path.read_text())["rows"] == [one, other]
    report.write_json(path, ABOUT, [{**one, "ms": 3.0}])
    assert [row["ms"] for row in json.loads(path.read_text())["rows"]] == [2.0, 3.0]
    report.write_json(path, {**ABOUT, "commit": "def"}, [one])
    assert json.loads(path.read_text())["rows"] == [one]


def test_case_slower_than_its_peer_is_listed() -> None:
    timed = {"kernel": "linear", "impl": "triton", "ms": 0.1, "peer": "cublas", "peer_ms": 0.098}
    rows: list[report.Row] = [
        {**timed, "case": "slower", "speedup": 0.98},
        {**timed, "case": "as-fast", "speedup": 0.996},
        {**timed, "case": "other-kernel", "speedup": 0.5, "impl": "tiled"},
        {"kernel": "linear", "case": "alone", "impl": "triton", "ms": 0.1},
    ]
    *_, last = report.slower_table(rows).splitlines()
    assert last == "| `linear` | slower | 100.0 | cublas, 98.0 | 0.98 |"
    assert len(report.slower_table(rows).splitlines()) == 3


def test_spread_is_given_in_percentiles() -> None:
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Time(3.5, 2.0, 5.0)


def test_garbage_collection_is_off_during_timing() -> None:
    seen: list[bool] = []
    alternate({"call": lambda: seen.append(gc.isenabled())}, 2, 1, torch.device("cpu"))
    assert seen == [False] * 3
    assert gc.isenabled()
