"""Kernels in a trace of torch.profiler: in which scope each was launched, and when it ran.

A CUDA graph hides which operation launched a kernel. So a step is traced twice. Launched kernel by
kernel, each call of an operation is a scope of its own, and a kernel belongs to the scope in which it
was launched. The replay has the same kernels in the same order, and its kernels get the operations
of their partners.
"""

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

Event = Mapping[str, Any]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_SCOPE = "user_annotation"


@dataclass(frozen=True)
class Work:
    """A kernel, copy or fill on the device.

    Attributes:
        name: Its name.
        begin: Its begin in microseconds.
        end: Its end.
        scope: The name of the scope in which it was launched, if any.
    """

    name: str
    begin: float
    end: float
    scope: str | None = None


@dataclass(frozen=True)
class Spent:
    """Microseconds of the device: of each piece of work, and of the gaps between them.

    They add up to the time from the first begin to the last end. If two pieces overlap, which
    dependent launch does on purpose, the time counts for the earlier one.
    """

    work: Sequence[float]
    gaps: float


def trace(run: Callable[[], object]) -> list[Event]:
    """Run ``run`` and return the events of its trace, in the format of Chrome's traces."""
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]
    ) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Open a scope of the trace, in which all work ends before the scope does."""
    with torch.profiler.record_function(name):
        yield
        torch.cuda.synchronize()


def work_of(events: Iterable[Event], prefix: str) -> list[Work]:
    """Return the work on the device in the order of its begins, with scopes named ``prefix``...

    A piece of work belongs to the scope around its launch. If the trace lacks the launch, it belongs
    to the scope around its begin. ``scope`` waits for the end of its work, so both are the same.
    """
    launches: dict[object, float] = {}
    scopes: list[tuple[float, float, str]] = []
    device: list[Event] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category in _LAUNCHES:
            launches[event.get("args", {}).get("correlation")] = event["ts"]
        elif category == _SCOPE and event["name"].startswith(prefix):
            scopes.append((event["ts"], event["ts"] + event["dur"], event["name"]))
        elif category in _ON_DEVICE:
            device.append(event)
    scopes.sort()
    begins = [begin for begin, _, _ in scopes]
    found = []
    for event in sorted(device, key=lambda event: float(event["ts"])):
        launch = launches.get(event.get("args", {}).get("correlation"))
        at = float(event["ts"]) if launch is None else launch
        place = bisect_right(begins, at) - 1
        inside = place >= 0 and at <= scopes[place][1]
        name = scopes[place][2] if inside else None
        begin = float(event["ts"])
        found.append(Work(event["name"], begin, begin + float(event["dur"]), name))
    return found


def partners(known: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return for each of ``names`` its place in ``known``, which has the same names in that order.

    Where the two differ, a name has no partner.
    """
    places: list[int | None] = [None] * len(names)
    for block in SequenceMatcher(None, known, names, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            places[block.b + i] = block.a + i
    return places


def spent(work: Sequence[Work]) -> Spent:
    """Divide the time from the first begin to the last end among ``work``, ordered by begins."""
    times, gaps = [], 0.0
    free = work[0].begin if work else 0.0
    for one in work:
        gaps += max(0.0, one.begin - free)
        times.append(max(0.0, one.end - max(free, one.begin)))
        free = max(free, one.end)
    return Spent(times, gaps)
