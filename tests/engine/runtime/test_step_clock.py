"""Where the engine's time goes: parts that add up, and events that nothing waits for."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from graph_stand_in import PADDED_REFERENCE, StandInPool
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.runtime import step_clock
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.image_graphs import patch_sizes
from idefics2_engine.runtime.stats import EngineStats
from idefics2_engine.runtime.step_clock import StepClock
from idefics2_engine.runtime.text_graphs import token_sizes
from oracle import random_image

SETTINGS = {"max_model_len": 200, "max_num_seqs": 4}
CPU = torch.device("cpu")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the times that the clock reads."""
    now = {"wall": 100.0, "cpu": 10.0}
    monkeypatch.setattr(step_clock, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(step_clock, "thread_time", lambda: now["cpu"])
    return now


def test_each_part_is_the_time_since_the_last_lap(times: dict[str, float]) -> None:
    stats = EngineStats()
    clock = StepClock(stats, CPU)

    def lap(wall: float, cpu: float, *arguments: Any) -> None:
        times["wall"] += wall
        times["cpu"] += cpu
        clock.lap(*arguments)

    lap(1, 0.5, "plan", "image")
    lap(2, 1, "launch")
    # The wait is for the step before
    lap(4, 0.5, "wait", "decode")
    lap(8, 2, "land", "decode")
    lap(16, 4, "output")
    lap(32, 0.25, "idle")
    lap(64, 8, "plan", "text")
    assert (stats.plan_seconds, stats.launch_seconds, stats.wait_seconds) == (65, 2, 4)
    assert (stats.land_seconds, stats.output_seconds, stats.idle_seconds) == (8, 16, 32)
    assert stats.thread_seconds == 127
    assert (stats.decode_cpu_seconds, stats.text_cpu_seconds) == (6.5, 8)
    assert stats.image_cpu_seconds == 1.5
    times["wall"] += 128
    # Reading changes nothing
    for _ in range(2):
        assert clock.read() == replace(stats, idle_seconds=32 + 128)
    assert stats.idle_seconds == 32


class Event:
    """An event of a device that is done with everything before ``now``.

    There is no ``synchronize``.
    """

    made: "list[Event]"
    now: float
    launched: float

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0
        self.made.append(self)

    def record(self) -> None:
        self.at = Event.launched

    def query(self) -> bool:
        return self.at < Event.now

    def elapsed_time(self, end: "Event") -> float:
        assert self.query()
        assert end.query()
        return end.at - self.at


def test_device_time_is_added_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made, Event.now, Event.launched = [], 0.0, 0.0
    stats = EngineStats()
    clock = StepClock(stats, torch.device("cuda"))

    def launch(kind: Any, begin: float, end: float) -> None:
        Event.launched = begin
        clock.begin_launches(kind)
        Event.launched = end
        clock.end_launches()

    launch("image", 0, 500)
    launch("decode", 500, 600)
    clock.collect()
    assert stats.device_seconds == 0
    Event.now = 550
    clock.collect()
    assert (stats.image_device_seconds, stats.decode_device_seconds) == (0.5, 0)
    # Launches that raised are not counted
    Event.launched = 700
    clock.begin_launches("image")
    launch("text", 1000, 3000)
    Event.now = 4000
    clock.collect()
    clock.collect()
    assert stats.image_device_seconds == 0.5
    assert (stats.decode_device_seconds, stats.text_device_seconds) == (0.1, 2)
    assert stats.device_seconds == 2.6
    # Events are used again
    for step in range(20):
        launch("decode", 10 * step, 10 * step + 5)
        clock.collect()
    assert len(Event.made) <= 6


def test_cpu_has_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "Event")
    stats = EngineStats()
    clock = StepClock(stats, CPU)
    clock.begin_launches("decode")
    clock.end_launches()
    clock.collect()
    assert stats == EngineStats()


def rows(count: int) -> list[Any]:
    """Return prompts, every second one with one of three pictures."""
    return [
        {
            "prompt": "<image>" * (i % 2) + f"{i} chickens sit on the car",
            "multi_modal_data": {"image": [random_image(60, 90, seed=i // 4)] * (i % 2)},
        }
        for i in range(count)
    ]


def test_parts_of_a_run_add_up(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, min_tokens=5)
    prompts = llm.processor.finish(llm.request_builder.read_prompts(rows(12)))
    # No call is unfinished, so the engine may be used on this thread
    engine, clock, before = llm.engine, llm.engine.clock, replace(llm.stats)
    outer = perf_counter()
    clock.start()
    inner = perf_counter()
    for prompt in prompts:
        engine.add(llm.request_builder.build(prompt, params))
    while engine.has_work:
        engine.step()
    inner = perf_counter() - inner
    clock.lap("output")
    outer = perf_counter() - outer
    parts = llm.stats.thread_seconds - before.thread_seconds
    assert inner - 1e-6 <= parts <= outer + 1e-6
    assert llm.stats.idle_seconds == before.idle_seconds


def test_stats_count_steps_by_kind_and_hits(llm: LLM) -> None:
    before = replace(llm.stats)
    outputs = list(llm.iterate(rows(12), SamplingParams(max_tokens=5, min_tokens=5)))
    after = replace(llm.stats)
    done = {name: value - getattr(before, name) for name, value in vars(after).items()}
    assert done["encoded_tiles"] + done["cached_tiles"] == 6
    assert done["encoded_tiles"] <= 3
    assert done["cached_tokens"] == sum(output.num_cached_tokens for output in outputs)
    steps = done["decode_steps"] + done["text_steps"] + done["image_steps"]
    assert after.steps - before.steps == steps
    assert done["decode_steps"] > 0
    for part in ("plan", "launch", "land", "output", "prepare"):
        assert done[f"{part}_seconds"] > 0
    assert after.decode_cpu_seconds > 0
    assert after.device_seconds == 0


def test_padding_is_counted_apart_from_decode_steps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idefics2_engine.runtime.model_runner.GraphPool", StandInPool)
    llm = LLM(checkpoint, device="cpu", ops=PADDED_REFERENCE, max_model_len=200)
    engine = Engine(
        llm.model,
        llm.engine.tokenizer,
        llm.processor.image_config,
        llm.engine.generation,
        replace(llm.engine_config, cuda_graphs=True),
    )
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    image = random_image(60, 90, seed=0)
    for prompt in (llm.processor.prompt("the chicken"), llm.processor.prompt("<image>", [image])):
        engine.add(llm.request_builder.build(prompt, params))
        while engine.has_work:
            engine.step()
    stats = engine.stats
    prompts = stats.computed_tokens - 3 * 2
    assert (stats.text_steps, stats.image_steps) == (1, 1)
    # The smallest graphs, of the text model and of the vision tower
    assert stats.padded_tokens == 2 * token_sizes(8192)[0] - prompts
    assert stats.padded_patches == patch_sizes(1)[0] - stats.encoded_patches


@pytest.mark.gpu
def test_device_seconds_are_within_the_wall_time_on_a_gpu(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cuda", kv_cache_tokens=4096, max_model_len=200)
    params = SamplingParams(max_tokens=64, min_tokens=64)
    llm.generate("warm", params)
    torch.cuda.synchronize()
    before, begin = llm.engine.clock.read(), perf_counter()
    llm.generate(["the chicken sits"] * 4, params)
    torch.cuda.synchronize()
    seconds, after = perf_counter() - begin, llm.engine.clock.read()
    assert after.decode_steps > before.decode_steps
    assert 0 < after.device_seconds - before.device_seconds < seconds
