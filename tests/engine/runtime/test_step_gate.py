"""The gate that rows wait at: when it is closed, and that it always opens again."""

from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.request_builder import RequestBuilder
from idefics2_engine.runtime.step_gate import StepGate
from idefics2_engine.sampling.sampler import Drawn

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_gate_is_closed_inside_and_open_afterwards() -> None:
    gate = StepGate(is_used=True)
    gate.wait()
    with gate.closed():
        assert not gate.is_open
        with gate.opened():
            assert gate.is_open
        assert not gate.is_open
    assert gate.is_open


def test_gate_opens_again_after_an_error() -> None:
    gate = StepGate(is_used=True)
    with pytest.raises(KeyError), gate.closed():
        raise KeyError
    assert gate.is_open


def test_unused_gate_never_closes() -> None:
    gate = StepGate(is_used=False)
    with gate.closed():
        assert gate.is_open
        with gate.opened():
            assert gate.is_open
        assert gate.is_open


def test_gate_is_closed_in_launches_and_open_in_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[bool]] = {"launch": set(), "wait": set()}
    with LLM(device="cpu") as llm:
        engine = llm.engine
        engine.gate = StepGate(is_used=True)
        run, wait = engine.runner.run, Drawn.wait
        fails = [True]

        def launched(step: Any) -> Any:
            seen["launch"].add(engine.gate.is_open)
            if fails:
                raise RuntimeError(fails.pop())
            return run(step)

        def waited(drawn: Drawn) -> None:
            seen["wait"].add(engine.gate.is_open)
            wait(drawn)

        monkeypatch.setattr(engine.runner, "run", launched)
        monkeypatch.setattr(Drawn, "wait", waited)
        failed, *answered = llm.iterate(["first"], GREEDY), llm.iterate(["a", "b"], GREEDY)
        assert next(failed).error is not None
        assert [output.error for rows in answered for output in rows] == [None, None]
        assert engine.gate.is_open
    assert seen == {"launch": {False}, "wait": {True}}


@pytest.mark.parametrize("ask", ["iterate", "submit"])
def test_each_row_waits_its_turn_before_it_is_prepared(
    monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    calls: list[str] = []
    wait, build = StepGate.wait, RequestBuilder.build_row

    def waiting(gate: StepGate) -> None:
        calls.append("wait")
        wait(gate)

    def building(builder: RequestBuilder, *row: Any) -> Any:
        calls.append("prepare")
        return build(builder, *row)

    monkeypatch.setattr(StepGate, "wait", waiting)
    monkeypatch.setattr(RequestBuilder, "build_row", building)
    with LLM(device="cpu", image_threads=1) as llm:
        if ask == "iterate":
            outputs = list(llm.iterate(["a", "b"], GREEDY))
        else:
            outputs = [llm.submit(text, GREEDY).result() for text in ("a", "b")]
    assert [output.error for output in outputs] == [None, None]
    first, second = (index for index, call in enumerate(calls) if call == "prepare")
    assert "wait" in calls[:first]
    assert "wait" in calls[first:second]
