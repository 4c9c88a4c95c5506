"""``idefics2 bench steps``: costs of calls, kernels of a trace, rows, and the suite on a CPU."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_command import CPU, bench
from idefics2_bench.latency import OurSteps
from idefics2_bench.results.compare import compare
from idefics2_bench.results.page import page_of
from idefics2_bench.results.result_charts import charts_of
from idefics2_bench.results.results_file import ResultsFile, Row, read_results
from idefics2_bench.steps import device_trace, division
from idefics2_bench.steps.device_trace import Event, Work, partners, spent, work_of
from idefics2_bench.steps.division import divide, division_of
from idefics2_bench.steps.model_steps import model_step
from idefics2_bench.steps.operation_calls import Call, WatchedOps, call_of
from idefics2_bench.steps.parts import BETWEEN, OTHER, OUTSIDE, WHOLE
from idefics2_bench.steps.step_rows import rows_of
from idefics2_bench.timing import Time
from idefics2_engine import LLM
from idefics2_engine.charts.row_chart import RowChart
from idefics2_engine.cli.main import main
from idefics2_engine.errors import ConfigError, Idefics2Error
from idefics2_engine.jobs.plan.latency_case import latency_case
from idefics2_kernels import REFERENCE
from idefics2_kernels.catalog import CATALOG, Cost, KernelSpec

pytestmark = pytest.mark.usefixtures("own_arguments")

# No step of the model calls these
_NOT_IN_STEPS = {"nf4_quantize", "nf4_dequantize", "sample"}
CALLS = [
    Call("linear", "8x4", Cost(bytes=4000, flops=100)),
    Call("silu_mul", "4", Cost(bytes=1000, flops=100)),
    Call("linear", "8x4", Cost(bytes=1000, flops=900_000)),
]
CEILINGS = {"copy_TBps": 1e-3, "matmul_TFLOPs": 1e-3}


@pytest.mark.parametrize(
    "spec", [spec for spec in CATALOG if spec.name not in _NOT_IN_STEPS], ids=lambda spec: spec.name
)
def test_cost_of_a_call_is_the_catalog_s(spec: KernelSpec) -> None:
    cases = [case for case in spec.cases if case.where == "any" and "shared" not in case.dims]
    assert cases
    for case in cases:
        call = call_of(spec.name, (), spec.make_inputs(case, torch.device("cpu")))
        assert call.cost == spec.cost(case), case.name


def test_step_makes_the_calls_of_the_engine_s_step(tiny: Path) -> None:
    watched = WatchedOps(REFERENCE)
    llm = LLM(tiny, device="cpu", split_images=False, ops=watched.ops)
    case = latency_case("decode-b3-s20")
    with torch.inference_mode():
        expected = watched.calls_of(model_step(case, llm.model))
        # The prompts are a step of as many calls
        both = watched.calls_of(OurSteps(case, llm, rounds=1).first)
    assert len(both) == 2 * len(expected)
    assert both[len(expected) :] == expected
    assert all(call.cost is not None for call in expected)


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> Event:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_belong_to_the_scope_of_their_launch() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "call 0", 10, 10),
        event("user_annotation", "another's", 0, 100),
        event("user_annotation", "call 1", 30, 10),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, 1),
        event("cuda_driver", "cuLaunchKernelEx", 33, 1, 2),
        event("cuda_runtime", "cudaLaunchKernel", 25, 1, 3),
        # The trace may lack a launch
        event("kernel", "late", 35, 2, 9),
        event("kernel", "driver", 45, 3, 2),
        event("gpu_memset", "Memset", 26, 1, 3),
        event("kernel", "runtime", 13, 4, 1),
    ]
    assert work_of(events, "call ") == [
        Work("runtime", 13, 17, "call 0"),
        Work("Memset", 26, 27, None),
        Work("late", 35, 37, "call 1"),
        Work("driver", 45, 48, "call 1"),
    ]


def test_partners_are_found_around_work_that_only_one_trace_has() -> None:
    known = ["copy", "a", "b", "a", "b"]
    assert partners(known, known) == [0, 1, 2, 3, 4]
    assert partners(known, ["a", "b", "fill", "a", "b"]) == [1, 2, None, 3, 4]


def test_time_of_overlapping_work_counts_once() -> None:
    work = [Work("a", 0, 10), Work("b", 8, 20), Work("c", 12, 15), Work("d", 23, 25)]
    found = spent(work)
    assert list(found.work) == [10, 10, 0, 2]
    assert found.gaps == 3
    assert sum(found.work) + found.gaps == 25


def replays(*names: str, rounds: int = 3) -> list[Work]:
    """Return rounds of kernels of 2 us with gaps of 1 us; the first round is slower."""
    found = []
    for number in range(rounds):
        begin, each = 1000.0 * number, 2.0 if number else 200.0
        for place, name in enumerate(names):
            start = begin + place * (each + 1)
            found.append(Work(name, start, start + each, f"idefics2 round {number}"))
    return found


LAUNCHED = [
    Work("embed", 0, 1),
    Work("gemm", 10, 11, "idefics2 call 0"),
    Work("reduce", 11, 12, "idefics2 call 0"),
    Work("silu", 20, 21, "idefics2 call 1"),
    Work("gemm", 30, 31, "idefics2 call 2"),
]


def test_replayed_kernels_get_the_operations_of_their_partners() -> None:
    found = division_of(LAUNCHED, replays("embed", "gemm", "reduce", "silu", "gemm"), CALLS)
    expected = {OTHER: 0.002, "linear 8x4": 0.006, "silu_mul 4": 0.002, BETWEEN: 0.004}
    assert len(found.rounds) == 2
    for own in found.rounds:
        assert own == pytest.approx(expected)
    assert found.launches == {OTHER: 1, "linear 8x4": 3, "silu_mul 4": 1}
    assert found.num_unmatched == 0


def test_kernel_that_only_the_replay_has_is_counted() -> None:
    names = ("embed", "gemm", "reduce", "fill", "silu", "gemm")
    found = division_of(LAUNCHED, replays(*names), CALLS)
    assert found.num_unmatched == 2
    assert found.rounds[0] == pytest.approx(
        {OTHER: 0.004, "linear 8x4": 0.006, "silu_mul 4": 0.002, BETWEEN: 0.005}
    )


@pytest.mark.parametrize(("launched", "replayed"), [([], replays("gemm")), (LAUNCHED, [])])
def test_trace_without_kernels_is_an_error(launched: list[Work], replayed: list[Work]) -> None:
    with pytest.raises(Idefics2Error, match="must record the kernels of a step"):
        division_of(launched, replayed, CALLS)


class _Replayed:
    """A graph that runs its calls."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def test_trace_of_torch_s_profiler_is_divided(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedOps(REFERENCE)
    llm = LLM(tiny, device="cpu", split_images=False, ops=watched.ops)
    step = model_step(latency_case("decode-b2-s20"), llm.model)
    profile, traced = torch.profiler.profile, device_trace.trace

    def with_kernels(run: Callable[[], object]) -> list[Event]:
        """Trace ``run`` on the CPU, and add a kernel a call to the scopes that are there."""
        events = traced(run)
        scopes = [e for e in events if e.get("cat") == "user_annotation"]
        scopes = [e for e in scopes if e["name"].startswith("idefics2 ")]
        for scope in scopes:
            names = [scope["name"].rpartition(" ")[2]]
            if "round" in scope["name"]:
                names = [str(number) for number in range(len(calls))]
            for place, name in enumerate(names):
                begin = scope["ts"] + scope["dur"] * place / len(names)
                events.append(event("kernel", name, begin, scope["dur"] / len(names)))
        return events

    monkeypatch.setattr(
        torch.profiler, "profile", lambda activities: profile(activities=activities[:1])
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(division, "captured", _Replayed)
    monkeypatch.setattr(division, "trace", with_kernels)
    with torch.inference_mode():
        calls = watched.calls_of(step)
        found = divide(step, watched, calls, 2, torch.device("cuda"))
    assert len(found.rounds) == 2
    assert found.launches == Counter(call.label for call in calls)
    assert found.num_unmatched == 0
    # All kernels of a round take the same time
    for own in found.rounds:
        each = {label: own[label] / number for label, number in found.launches.items()}
        assert list(each.values()) == pytest.approx([max(each.values())] * len(each), rel=0.05)


def test_rows_have_floors_and_shares() -> None:
    launched = division_of(LAUNCHED, replays("embed", "gemm", "reduce", "silu", "gemm"), CALLS)
    whole, *parts = rows_of(CALLS, Time(0.02, 0.01, 0.03), launched, CEILINGS)
    assert [part["operation"] for part in parts] == ["linear 8x4", BETWEEN, OTHER, "silu_mul 4"]
    assert whole["operation"] == WHOLE
    assert whole["traced_ms"] == pytest.approx(0.014)
    assert sum(part["ms"] for part in parts) == pytest.approx(whole["traced_ms"])
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    product = parts[0]
    # At 1 GB/s and 1 GFLOP/s: 4 us for bytes, then 900 us for FLOP
    assert product["floor_ms"] == pytest.approx(0.904)
    assert (product["calls"], product["launches"], product["bound"]) == (2, 3, "FLOP")
    assert (product["bytes"], product["flops"]) == (5000, 900_100)
    assert product["over_floor"] == pytest.approx(0.006 / 0.904)
    assert parts[3]["bound"] == "bytes"
    assert "floor_ms" not in parts[1]
    assert whole["floor_ms"] == pytest.approx(0.905)
    assert whole["over_floor"] == pytest.approx(0.02 / 0.905)


def test_suite(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["decode-b3-s20", "prefill-40", "image-56x84-b2"]
    options = ["steps", "--model", str(tiny), "--rounds", "2", "--report", str(tmp_path / "a.html")]
    options += [word for name in names for word in ("--case", name)]
    about, rows = bench(tmp_path / "steps.json", *options)
    assert about["copy_TBps"] > 0
    assert [row["case"] for row in rows if row["operation"] == WHOLE] == names
    for name in names:
        whole, *parts = [row for row in rows if row["case"] == name]
        assert sum(part["ms"] for part in parts) == pytest.approx(whole["traced_ms"])
        assert sum(part.get("floor_ms", 0) for part in parts) == pytest.approx(whole["floor_ms"])
        assert [part["operation"] for part in parts if "floor_ms" not in part] == [OUTSIDE]
    (attention,) = [
        row for row in rows if row["case"] == names[0] and "paged_attention" in row["operation"]
    ]
    # There are two layers
    assert attention["calls"] == 2
    (first,) = [row for row in rows if row["case"] == names[2] and row["operation"] == WHOLE]
    assert (first["images"], first["patches"], first["batch"]) == (2, 48, 2)
    printed = capsys.readouterr().out
    assert "decode-b3-s20, reference" in printed
    assert f"| {attention['operation']} | 2 |" in printed
    (file,) = read_results([tmp_path / "steps.json"])
    assert len(compare(file, file, 0.05).changes) == len(rows)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Steps by operation" in page
    assert "prefill-40 by operation" in page


def test_nf4_has_its_own_products(tiny: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny), "--quantization", "nf4", "--rounds", "1"]
    _, rows = bench(tmp_path / "steps.json", "steps", *options, "--case", "decode-b2-s20")
    assert {row["case"] for row in rows} == {"decode-b2-s20-nf4"}
    products = [row for row in rows if row["operation"].startswith("nf4_matmul")]
    assert products
    assert all(row["over_floor"] > 0 for row in products)


def test_step_that_is_not_finite_has_no_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return REFERENCE.linear(x, weight, bias) * float("nan")

    spoiled_ops = replace(REFERENCE, linear=spoiled)
    monkeypatch.setattr("idefics2_bench.steps.suite.REFERENCE", spoiled_ops)
    options = ["--model", str(tiny), "--case", "decode-b2-s20"]
    assert main(["bench", "steps", *CPU, *options]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "decode"], "case must be one like"),
        (["--case", "image-980-b1"], "the model's images have at most"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--device", "cuda", "--ops", "reference"], "--ops on a GPU must be triton"),
    ],
    ids=["case", "misfit", "rounds", "ops"],
)
def test_bad_options_are_refused(
    options: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "steps", "--model", str(tiny), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def part(operation: str, ms: float, **fields: Any) -> Row:
    head = {"kernel": "steps", "case": "decode-b1", "impl": "triton", "operation": operation}
    return {**head, "ms": ms, "ms_p20": ms, "ms_p80": ms, "model": "m", **fields}


STEP = [
    part(WHOLE, 10.0, traced_ms=11.0, floor_ms=8.0, launches=9),
    part("linear 8x4", 8.0, calls=32, bytes=8, flops=8, floor_ms=6.0),
    part("paged_attention 2x2", 2.95, calls=32, bytes=8, flops=8, floor_ms=2.0),
    part(OTHER, 0.05),
]


def test_slower_part_is_shown_but_only_a_slower_step_counts() -> None:
    slower = [STEP[0], part("linear 8x4", 9.0), *STEP[2:]]
    found = compare(ResultsFile("a", {}, STEP), ResultsFile("b", {}, slower), 0.05)
    assert [change.verdict for change in found.ours] == ["slower", "same", "same", "same"]
    assert found.ours[0].name == "steps decode-b1 triton linear 8x4"
    assert found.regressions(0.05) == []
    slower[0] = part(WHOLE, 12.0)
    found = compare(ResultsFile("a", {}, STEP), ResultsFile("b", {}, slower), 0.05)
    assert [change.name for change in found.regressions(0.05)] == [
        "steps decode-b1 triton whole step"
    ]


def test_charts_of_a_step_show_its_parts_and_floors() -> None:
    files = [ResultsFile("f", {}, STEP)]
    charts = {named.name: named.chart for named in charts_of(files)}
    assert list(charts) == ["steps", "step-decode-b1"]
    every, one = charts["steps"], charts["step-decode-b1"]
    assert isinstance(every, RowChart)
    assert isinstance(one, RowChart)
    (row,) = every.rows
    assert [bar.value for bar in row.bars] == pytest.approx([800 / 11, 295 / 11, 5 / 11])
    assert [dot.value for dot in row.dots] == [80]
    assert row.remark == "10 ms, 1.25 x floor"
    assert [row.label for row in one.rows] == ["linear 8x4", "paged_attention 2x2", "1 more"]
    assert [dot.value for dot in one.rows[0].dots] == [6.0]
    assert one.rows[0].remark == "73%, 1.33 x floor"
    (table,) = [table for table in page_of(files).tables if table.heading == "Parts of steps"]
    assert len(table.rows) == 3


def test_names_of_charts_are_names_of_files() -> None:
    rows = [{**row, "case": "../decode b1"} for row in STEP]
    files = [ResultsFile("f", {}, rows), ResultsFile("g", {}, rows)]
    assert [named.name for named in charts_of(files)] == [
        *("steps", "step--decode-b1", "step--decode-b1-2")
    ]


def test_part_without_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"machine": {}, "rows": [{"kernel": "steps", "case": "c", "impl": "i"}]}')
    with pytest.raises(ConfigError, match="row 0 must have a text as 'operation'"):
        read_results([path])


@pytest.mark.gpu
def test_kernels_of_a_graph_are_those_of_its_launches(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    names = ("decode-b2", "prefill-100", "image-112x84-b2")
    cases = [word for name in names for word in ("--case", name)]
    assert main(["bench", "steps", "--device", "cuda", *cases, "--json", str(out)]) == 0
    (file,) = read_results([out])
    for name in names:
        whole, *parts = [row for row in file.rows if row["case"] == name]
        assert whole["unmatched"] == 0
        assert all(part["launches"] >= part["calls"] for part in parts if "calls" in part)
        calls = sum(part.get("calls", 0) for part in parts)
        assert whole["launches"] >= calls > 0
