"""``idefics2 bench offline`` on a tiny checkpoint beside transformers."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_command import CPU, bench, compile_with
from idefics2_bench import machine, offline
from idefics2_bench.offline_peers import (
    Batches,
    EagerGeneration,
    compiled_generation,
    run_batches,
)
from idefics2_bench.offline_workloads import WORKLOADS, offline_requests
from idefics2_bench.transformers_peer import transformers_model
from idefics2_engine import LLM
from idefics2_engine.cli.main import main
from tiny_checkpoint import LATENTS, write_checkpoint

pytestmark = pytest.mark.usefixtures("own_arguments")


@pytest.fixture(autouse=True)
def _no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes seconds
    monkeypatch.setattr(machine, "loop_seconds", lambda: 0.5)


def test_offline_rows_beside_transformers(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--requests", "4", "--shrink", "8", "--peer-batch", "3", "--rounds", "3"]
    about, rows = bench(tmp_path / "out.json", "offline", "--model", str(tiny), *options)
    assert [row["impl"] for row in rows] == [
        "reference",
        "transformers-arrival",
        "transformers-sorted",
    ]
    llm = LLM(tiny, device="cpu", split_images=False)
    # The peer's requests are those of the first round, and ours those of the median round
    rounds = []
    for seed in (0, 2, 3):
        requests = offline_requests("mixed", llm.processor, 4, seed, shrink=8)
        drafts = [llm.processor.draft_token_prompt(r.prompt_token_ids, r.images) for r in requests]
        prompts = llm.processor.finish(drafts)
        rounds.append(
            {
                "requests": 4,
                "images": sum(len(prompt.tiles) for prompt in prompts),
                "patches": sum(len(tile.position_ids()) for p in prompts for tile in p.tiles),
                "image_tokens": sum(prompt.token_ids.count(32001) for prompt in prompts),
                "text_tokens": sum(id != 32001 for prompt in prompts for id in prompt.token_ids),
                "new_tokens": sum(request.max_tokens for request in requests),
            }
        )
    for row in rows:
        assert (row["kernel"], row["case"]) == ("offline", "offline-4-shrink8")
        counts = {name: row[name] for name in rounds[0]}
        assert counts in (rounds if row is rows[0] else rounds[:1])
        for name, count in counts.items():
            assert row[f"{name}_per_s"] == pytest.approx(1e3 * count / row["ms"])
    best = min(rows[1:], key=lambda row: row["ms"])
    assert (rows[0]["peer"], rows[0]["peer_ms"]) == (best["impl"], best["ms"])
    assert rows[0]["speedup"] == pytest.approx(best["ms"] / rows[0]["ms"])
    assert 0 < rows[1]["prepare_ms"] < rows[1]["ms"]
    ours = rows[0]
    assert sorted(ours["rounds_ms"]) == ours["rounds_ms"]
    assert ours["ms"] == ours["rounds_ms"][1]
    assert (ours["cached_tokens"], ours["cached_tiles"]) == (0, 0)
    assert ours["encoded_tiles"] == ours["images"]
    assert (ours["compiled_kernels"], ours["captured_graphs"]) == (0, 0)
    assert ours["loop_seconds"] == about["loop_seconds"] > 0
    assert ours["start_seconds"] > ours["first_seconds"] > 0
    # A CPU has no device seconds, and all of the thread's work counts for a slower host
    assert ours["device_seconds"] == {
        "decode": 0,
        "text": 0,
        "image": 0,
        "idle": pytest.approx(ours["ms"] / 1e3),
    }
    slowdown = 1.2 / ours["loop_seconds"]
    cpu = sum(ours["thread_cpu_seconds"].values())
    assert ours["slow_host"]["seconds"] == pytest.approx(ours["ms"] / 1e3 + (slowdown - 1) * cpu)
    printed = capsys.readouterr().out
    assert (
        "from caches: 0 tokens, 0 tiles, 0 decoded files; compiled in the job: 0 kernels, 0 graphs"
        in printed
    )
    assert "engine's thread, s: plan" in printed


def test_seconds_of_a_job_add_up(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", split_images=False)
    case = offline.Case("mixed", 3, 16, llm.processor)
    begin = time.perf_counter()
    row = offline.run_ours(llm, case, 1).row
    outer = time.perf_counter() - begin
    parts = row["thread_seconds"]
    assert sum(parts.values()) >= row["ms"] / 1e3
    assert sum(parts.values()) <= outer
    assert sum(row["device_seconds"].values()) == pytest.approx(row["ms"] / 1e3)
    assert sum(row["thread_cpu_seconds"].values()) > 0
    assert sum(row["steps"].values()) > 0
    assert row["prepare_seconds"] > 0


def test_several_workloads_run_with_rates_of_a_file(tiny: Path, tmp_path: Path) -> None:
    rates = [
        {"kernel": "image", "case": "image-112-b1", "impl": "triton", "ms": 2.0},
        {
            "kernel": "prefill",
            "case": "prefill-100",
            "impl": "triton",
            "ms": 4.0,
            "text_tokens": 100,
        },
        {"kernel": "step", "case": "decode-b2", "impl": "triton", "ms": 1.0, "batch": 2},
    ]
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rates}))
    workloads = ["--workload", "text:4,vqa", "--workload", "shared:6", "--workload", "split"]
    options = ["--requests", "3", "--shrink", "8", "--rounds", "1", "--no-peer"]
    options += ["--max-num-seqs", "2", "--rates", str(tmp_path / "rates.json")]
    _, rows = bench(tmp_path / "out.json", "offline", "--model", str(tiny), *workloads, *options)
    assert [row["case"] for row in rows] == [
        "text-4-shrink8",
        "vqa-3-shrink8",
        "shared-6-shrink8",
        "split-3-shrink8",
    ]
    text, vqa, shared, split = rows
    assert (text["images"], text["encoded_tiles"], text["cached_tokens"]) == (0, 0, 0)
    assert (vqa["images"], vqa["encoded_tiles"], vqa["cached_tiles"]) == (3, 3, 0)
    assert (shared["images"], shared["encoded_tiles"], shared["cached_tiles"]) == (6, 1, 5)
    assert [row["cached_files"] for row in rows] == [0, 0, 5, 0]
    # A page has 64 tokens, and the first two requests may be computed beside each other
    assert shared["cached_tokens"] in {128 * count for count in (4, 5)}
    assert (split["images"], split["encoded_tiles"]) == (3, 15)
    assert split["image_tokens"] == 15 * LATENTS
    for row in rows:
        bound = row["device_bound"]
        prompts = row["image_tokens"] + row["text_tokens"] - row["cached_tokens"]
        assert bound["seconds"]["prompts"] == pytest.approx(0.04e-3 * prompts)
        assert bound["requests_per_second"] == pytest.approx(
            row["requests"] / sum(bound["seconds"].values())
        )
        assert (bound["padded_seconds"], bound["padded_share"]) == (0, 0)
    # The tiny model shrinks an image to 112 x 84 pixels: 48 patches, of 2 ms / 64
    assert vqa["device_bound"]["seconds"]["images"] == pytest.approx(3 * 48 * 2e-3 / 64)
    assert shared["device_bound"]["seconds"]["images"] == pytest.approx(64 * 2e-3 / 64)
    # Answers of 8 tokens: the third sequence runs alone
    assert split["device_bound"]["seconds"]["decode"] == pytest.approx(14e-3)


def test_splitting_is_restored_after_a_workload(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", split_images=False)
    before = llm.request_builder, llm.processor
    case = offline.Case("split", 1, 64, WORKLOADS["split"].processor(llm.processor))
    assert offline.run_ours(llm, case, 1).row["encoded_tiles"] == 5
    assert (llm.request_builder, llm.processor) == before


def test_compiled_decoding_gives_the_tokens_of_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "eager")
    # The requests are longer than the window
    write_checkpoint(tmp_path, window=20)
    llm = LLM(tmp_path, device="cpu", split_images=False)
    peer = transformers_model(llm.model, tmp_path)
    requests = offline_requests("mixed", llm.processor, 5, shrink=8)
    batches = Batches(llm.processor, requests, 3, is_filled=True)
    assert [len(batch) for batch in batches] == [3, 3]
    answers: dict[str, list[torch.Tensor]] = {}
    eager = EagerGeneration(peer, 0)
    compiled, facts = compiled_generation(peer, batches, requests[:1])
    for name, generate in {"eager": eager, "compiled": compiled}.items():
        seen = answers[name] = []

        def keep(inputs: Any, count: int, generate: Any = generate, seen: Any = seen) -> Any:
            seen.append(generate(inputs, count))
            return seen[-1]

        assert run_batches(peer, keep, batches) > 0
    assert facts["compile_seconds"] > 0
    for eager_tokens, compiled_tokens in zip(answers["eager"], answers["compiled"], strict=True):
        assert torch.equal(eager_tokens, compiled_tokens)
    (first, *_), (_, last, copy) = answers["eager"]
    assert len(first) == max(request.max_tokens for request in requests[:3])
    assert torch.equal(last, copy)


def test_compiled_run_that_fails_does_not_end_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_graph: object) -> None:
        raise RuntimeError("no compiler here")

    compile_with(monkeypatch, broken)
    options = ["--requests", "2", "--shrink", "16", "--rounds", "1"]
    options += ["--peer-runs", "compiled,sorted"]
    _, rows = bench(tmp_path / "out.json", "offline", "--model", str(tiny), *options)
    ours, compiled, eager = rows
    assert (compiled["impl"], eager["impl"]) == (
        "transformers-compiled-sorted",
        "transformers-sorted",
    )
    assert "no compiler here" in compiled["error"]
    assert ours["peer"] == "transformers-sorted"


def test_decode_steps_of_generate_run_without_cudnn(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny, device="cpu", split_images=False)
    peer = transformers_model(llm.model, tiny)
    flags = torch.backends.cuda
    seen = []
    forward = type(peer).forward

    def watch(self: Any, *arguments: Any, **inputs: Any) -> Any:
        seen.append((inputs["input_ids"].shape[1], flags.cudnn_sdp_enabled()))
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(type(peer), "forward", watch)
    before = flags.cudnn_sdp_enabled()
    try:
        flags.enable_cudnn_sdp(True)
        inputs = {
            "input_ids": torch.tensor([[1, 5, 9]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        }
        assert EagerGeneration(peer, 0)(inputs, 3).shape == (1, 3)
        assert flags.cudnn_sdp_enabled()
    finally:
        flags.enable_cudnn_sdp(before)
    assert seen == [(3, True), (1, False), (1, False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "mixed,images"], "--workload must be some of mixed, text, .* got 'images'"),
        (["--workload", "vqa:0"], "--workload vqa: requests must be at least 1, got '0'"),
        (["--workload", "vqa:x"], "--workload vqa: requests must be at least 1, got 'x'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--peer-runs", "eager"], "--peer-runs must be some of arrival, .* got 'eager'"),
        (["--rates", "nothing.json"], "--rates must be a file of bench latency, got nothing.json"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "offline", *CPU, *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
