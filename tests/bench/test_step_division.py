"""Kernels of a trace: their operations and times, and the rows that these make."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from idefics2_bench.steps import device_trace, division
from idefics2_bench.steps.device_trace import Event, Work, partners, spent, work_of
from idefics2_bench.steps.division import divide, division_of
from idefics2_bench.steps.model_steps import model_step
from idefics2_bench.steps.operation_calls import Call, WatchedOps
from idefics2_bench.steps.parts import BETWEEN, OTHER, WHOLE
from idefics2_bench.steps.step_rows import rows_of
from idefics2_bench.timing import Time
from idefics2_engine import LLM
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.plan.latency_case import latency_case
from idefics2_kernels import REFERENCE
from idefics2_kernels.catalog import Cost

CALLS = [
    Call("linear", "8x4", Cost(bytes=4000, flops=100)),
    Call("silu_mul", "4", Cost(bytes=1000, flops=100)),
    Call("linear", "8x4", Cost(bytes=1000, flops=900_000)),
]
CEILINGS = {"copy_TBps": 1e-3, "matmul_TFLOPs": 1e-3}


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


def test_trace_of_torch_s_profiler_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedOps(REFERENCE)
    llm = LLM(device="cpu", ops=watched.ops, max_model_len=64, max_num_seqs=1)
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
