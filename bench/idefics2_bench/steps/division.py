"""The time of a step, divided among its operations: on a GPU from a trace, on a CPU by the clock."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

import torch

from idefics2_bench.steps.device_trace import Work, partners, scope, spent, trace, work_of
from idefics2_bench.steps.model_steps import ModelStep
from idefics2_bench.steps.operation_calls import Call, WatchedOps
from idefics2_bench.steps.parts import BETWEEN, OTHER, OUTSIDE
from idefics2_bench.timing import captured
from idefics2_engine.errors import Idefics2Error

_CALL, _ROUND = "idefics2 call ", "idefics2 round "


@dataclass(frozen=True)
class Division:
    """The parts of a step in several rounds.

    Attributes:
        rounds: Milliseconds of each part by its label, of each round.
        launches: Kernels of each part by its label. Empty on a CPU.
        num_unmatched: Kernels of all rounds without a partner, which count as ``OTHER``.
    """

    rounds: Sequence[Counter[str]]
    launches: Counter[str] = field(default_factory=Counter)
    num_unmatched: int = 0


def divide(
    step: ModelStep, watched: WatchedOps, calls: Sequence[Call], rounds: int, device: torch.device
) -> Division:
    """Run ``step``, whose ``calls`` are known, in ``rounds``.

    Raises:
        Idefics2Error: The profiler saw no kernels.
    """
    if device.type == "cuda":
        return _by_trace(step, watched, calls, rounds)
    return Division([_by_clock(step, watched, calls) for _ in range(-1, rounds)][1:])


def _by_clock(step: ModelStep, watched: WatchedOps, calls: Sequence[Call]) -> Counter[str]:
    times: Counter[str] = Counter()
    labels = iter(call.label for call in calls)

    @contextmanager
    def clock(*_call: Any) -> Iterator[None]:
        begin = perf_counter()
        yield
        times[next(labels)] += 1e3 * (perf_counter() - begin)  # type: ignore[assignment]

    begin = perf_counter()
    with watched.during(clock):
        step()
    whole = 1e3 * (perf_counter() - begin)
    times[OUTSIDE] = whole - times.total()  # type: ignore[assignment]
    return times


def _by_trace(step: ModelStep, watched: WatchedOps, calls: Sequence[Call], rounds: int) -> Division:
    graph = captured([step])

    def launch() -> None:
        numbers = count()

        def numbered(*_call: Any) -> AbstractContextManager[None]:
            return scope(f"{_CALL}{next(numbers)}")

        with watched.during(numbered):
            step()

    def replay() -> None:
        # The first round is left out
        for number in range(rounds + 1):
            with scope(f"{_ROUND}{number}"):
                graph.replay()

    return division_of(work_of(trace(launch), _CALL), work_of(trace(replay), _ROUND), calls)


def division_of(
    launched: Sequence[Work], replayed: Sequence[Work], calls: Sequence[Call]
) -> Division:
    """Divide the time of replays, of which the first is left out.

    Args:
        launched: Work of the step launched kernel by kernel, in the scopes of its calls.
        replayed: Work of the replays, each in a scope of its own.
        calls: Calls of the step.

    Raises:
        Idefics2Error: There are no kernels.
    """
    labels = [
        OTHER if work.scope is None else calls[int(work.scope.removeprefix(_CALL))].label
        for work in launched
    ]
    by_round: dict[str, list[Work]] = {}
    for work in replayed:
        if work.scope is not None:
            by_round.setdefault(work.scope, []).append(work)
    if not launched or len(by_round) < 2:
        raise Idefics2Error("the profiler must record the kernels of a step, but recorded none")
    found, unmatched = [], 0
    names = [work.name for work in launched]
    for own in list(by_round.values())[1:]:
        places = partners(names, [work.name for work in own])
        unmatched += places.count(None)
        parts = spent(own)
        times: Counter[str] = Counter()
        for place, microseconds in zip(places, parts.work, strict=True):
            times[OTHER if place is None else labels[place]] += microseconds / 1e3  # type: ignore[assignment]
        times[BETWEEN] = parts.gaps / 1e3  # type: ignore[assignment]
        found.append(times)
    return Division(found, Counter(labels), unmatched)
