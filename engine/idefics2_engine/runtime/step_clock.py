"""Where the time of the engine goes: the parts of its thread, and the device's time of each step.

The engine's thread calls ``lap`` at the end of each part of its work, so the parts add up to the
thread's time. On a CUDA device an event is recorded before a step's launches and one after them.
The pair is read at a later landing, when the device has passed it, and nothing ever waits for it.
"""

from collections import deque
from dataclasses import replace
from time import perf_counter, thread_time
from typing import Literal

import torch

from idefics2_engine.runtime.stats import EngineStats
from idefics2_engine.scheduling.step import StepKind

Part = Literal["plan", "launch", "wait", "land", "output", "idle"]


class StepClock:
    """Adds up seconds in ``stats``; one thread uses it at a time.

    Args:
        stats: Where the seconds are added.
        device: Device of the steps, whose current stream they are launched on.
    """

    def __init__(self, stats: EngineStats, device: torch.device) -> None:
        self._stats = stats
        self._has_events = device.type == "cuda"
        self._kind: StepKind = "decode"
        self._open: tuple[StepKind, torch.cuda.Event] | None = None
        self._launched: deque[tuple[StepKind, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self.start()

    def start(self) -> None:
        """Begin the first part, on the thread that calls this."""
        self._last_lap, self._cpu = perf_counter(), thread_time()

    def lap(self, part: Part, kind: StepKind | None = None) -> None:
        """End a part of the thread's work; the next one begins.

        Args:
            part: The part that ends.
            kind: Kind of the step that it belongs to. If ``None``, that of the part before.
        """
        now, cpu = perf_counter(), thread_time()
        self._kind = kind or self._kind
        self._add(f"{part}_seconds", now - self._last_lap)
        if part != "idle":
            self._add(f"{self._kind}_cpu_seconds", cpu - self._cpu)
        self._last_lap, self._cpu = now, cpu

    def begin_launches(self, kind: StepKind) -> None:
        """Mark the place before the launches of a step of ``kind``."""
        if self._has_events:
            self._open = kind, self._record()

    def end_launches(self) -> None:
        """Mark the place after the launches of the step that was begun last."""
        if self._open is not None:
            kind, begin = self._open
            self._launched.append((kind, begin, self._record()))
            self._open = None

    def collect(self) -> None:
        """Add the device's time of all steps that it has finished, without waiting."""
        while self._launched and self._launched[0][2].query():
            kind, begin, end = self._launched.popleft()
            self._add(f"{kind}_device_seconds", begin.elapsed_time(end) / 1e3)
            self._free += begin, end

    def read(self) -> EngineStats:
        """Return a copy of the stats up to now, on any thread, while the engine has no request."""
        idle = self._stats.idle_seconds + perf_counter() - self._last_lap
        return replace(self._stats, idle_seconds=idle)

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, field: str, seconds: float) -> None:
        setattr(self._stats, field, getattr(self._stats, field) + seconds)
