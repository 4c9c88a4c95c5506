"""Time ``generate`` on the engine and in transformers' loop, beside transformers and ``LLM``."""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from idefics2_bench.hf.answers import (
    ENGINE,
    LOOP,
    OF_LLM,
    Answer,
    llm_answer,
    own_answer,
    peer_answer,
)
from idefics2_bench.hf.cases import Texts
from idefics2_bench.hf.models import Models
from idefics2_bench.latency_peers import COMPILED_PEER
from idefics2_bench.timing import Time, alternate, synchronize
from idefics2_bench.workloads import Counts
from idefics2_engine.jobs.plan.device_rates import PEER

Row = dict[str, Any]


def generate_rows(models: Models, texts: Texts, rounds: int, compiled: bool) -> list[Row]:
    """Time all ways to answer ``texts``; with ``compiled``, transformers compiled is one of them.

    Our rows have the faster of transformers' times. If the compiled one fails, its row has an
    ``error`` instead of a time.
    """
    counts = Counts(
        text_tokens=texts.count * texts.length, new_tokens=texts.count * texts.new_tokens
    )
    with ExitStack() as stack:
        answers = {
            ENGINE: own_answer(ENGINE, models, texts),
            LOOP: own_answer(LOOP, models, texts),
            PEER: peer_answer(models, texts),
            OF_LLM: stack.enter_context(llm_answer(models, texts)),
        }
        if compiled:
            # transformers compiles the decode steps itself if the cache is static
            answers[COMPILED_PEER] = peer_answer(models, texts, cache_implementation="static")
        rows = timed_answers(answers, counts, models.device, rounds)
    models.own.engine.close()
    torch.compiler.reset()
    return rows


def timed_answers(
    answers: dict[str, Answer], counts: Counts, device: torch.device, rounds: int
) -> list[Row]:
    """Time ``answers`` in turns and return a row for each, with its first call."""
    firsts: dict[str, Tensor] = {}
    facts: dict[str, Row] = {name: {} for name in answers}
    for name, answer in answers.items():
        begin = time.perf_counter()
        try:
            if name == COMPILED_PEER:
                print("transformers is being compiled", file=sys.stderr)
            firsts[name] = answer()
        except Exception as error:
            if name != COMPILED_PEER:
                raise
            text = " ".join(str(error).split())
            facts[name]["error"] = f"{type(error).__name__}: {text:.300}"
            continue
        synchronize(device)
        facts[name]["first_call_seconds"] = time.perf_counter() - begin
    times = alternate({name: answers[name] for name in firsts}, rounds, 0, device)
    peers = [name for name in (PEER, COMPILED_PEER) if name in times]
    rows = []
    for name in answers:
        row: Row = {"impl": name, **asdict(counts), **facts[name]}
        if name in times:
            row |= {**asdict(times[name]), **counts.rates(times[name].ms / 1e3)}
            if name != PEER:
                row["same_tokens"] = float((firsts[name] == firsts[PEER]).float().mean())
        if name in (ENGINE, LOOP):
            row |= _beside(name, times, peers)
        rows.append(row)
    return rows


def _beside(name: str, times: dict[str, Time], peers: list[str]) -> Row:
    """Return the fields of our row: its fastest peer, and its share of the time of each other."""
    ms = times[name].ms
    best = min(peers, key=lambda peer: times[peer].ms)
    others = [other for other in times if other not in (ENGINE, LOOP)]
    return {
        "peer": best,
        "peer_ms": times[best].ms,
        "speedup": times[best].ms / ms,
        "share_of": {other: ms / times[other].ms for other in others},
    }
