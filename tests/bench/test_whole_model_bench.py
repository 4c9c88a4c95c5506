"""``idefics2 bench latency`` and ``load`` on a tiny checkpoint beside transformers."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_command import CPU, bench, compile_with
from idefics2_bench import latency, latency_peers, machine, report
from idefics2_bench.timing import Time
from idefics2_bench.transformers_peer import transformers_model
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.tensor_mapping import hub_tensors
from idefics2_engine.cli.main import main
from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.plan.latency_case import LatencyCase
from tiny_checkpoint import LATENTS, write_checkpoint

pytestmark = pytest.mark.usefixtures("own_arguments")


@pytest.fixture
def bare(tiny: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint without weights."""
    return Path(
        shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def test_latency(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["decode-b3-s20", "image-56x84-b2", "prefill-100"]
    cases = [argument for name in names for argument in ("--case", name)]
    about, rows = bench(
        tmp_path / "out.json", "latency", "--model", str(tiny), "--steps", "4", *cases
    )
    assert about["gpu"] is None
    assert about["commit"] == "abc"
    assert [(row["kernel"], row["case"], row["impl"]) for row in rows] == [
        (kernel, case, impl)
        for kernel, case in zip(("step", "image", "prefill"), names, strict=True)
        for impl in ("reference", "transformers")
    ]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["peer_difference"] < 1e-4
        assert (ours["peer"], ours["peer_ms"]) == ("transformers", theirs["ms"])
        assert ours["speedup"] == pytest.approx(theirs["ms"] / ours["ms"])
        assert 0 < ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"]
        assert ours["dtype"] == "float32"
    step, image, prefill = rows[::2]
    assert (step["batch"], step["context"], step["new_tokens"]) == (3, 20, 3)
    assert step["new_tokens_per_s"] == pytest.approx(3e3 / step["ms"])
    assert (image["images"], image["patches"], image["image_tokens"]) == (2, 48, 2 * LATENTS)
    assert image["patches_per_s"] == pytest.approx(48e3 / image["ms"])
    assert (prefill["text_tokens"], prefill["new_tokens"]) == (100, 1)
    printed = capsys.readouterr().out
    assert "| step | decode-b3-s20 | reference |" in printed


def test_rows_timed_before_an_interrupt_are_saved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_case = latency.bench_case

    def interrupted(case: LatencyCase, *rest: Any) -> list[latency.Row]:
        if case.kernel == "image":
            raise KeyboardInterrupt
        return time_case(case, *rest)

    monkeypatch.setattr(latency, "bench_case", interrupted)
    out = tmp_path / "out.json"
    cases = ["--case", "prefill-20", "--case", "image-56x84-b2"]
    options = ["--model", str(tiny), "--steps", "1", "--no-peer", *cases, "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["latency", *CPU, *options])
    with pytest.raises(KeyboardInterrupt):
        latency.main()
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["prefill-20"]


def test_images_of_many_sizes_agree_with_padded_ones(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", split_images=False)
    case = LatencyCase("image", "image-mixed-b3", 3, sizes=((56, 84), (112, 42), (28, 112)))
    peers = {"transformers": transformers_model(llm.model, tiny)}
    ours, _ = latency.bench_case(case, llm, peers, "reference", 1)
    assert ours["patches"] == 24 + 24 + 16
    assert ours["peer_difference"] < 1e-4


@pytest.mark.long
def test_compiled_peer_is_timed_beside_the_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Inductor would take a minute to compile the same computation
    compile_with(monkeypatch, "eager")
    write_checkpoint(tmp_path, window=64)
    # The case decodes beyond the window
    names = ["decode-b2-s60", "image-56x84-b2", "prefill-20"]
    cases = [argument for name in names for argument in ("--case", name)]
    options = ["--model", str(tmp_path), "--steps", "8", "--peer-compile", *cases]
    _, rows = bench(tmp_path / "out.json", "latency", *options)
    peers = ["transformers", "transformers-compiled"]
    assert [(row["case"], row["impl"]) for row in rows] == [
        *((name, impl) for name in names[:2] for impl in ("reference", *peers)),
        *((names[2], impl) for impl in ("reference", "transformers")),
    ]
    for ours, *theirs in (rows[:3], rows[3:6], rows[6:]):
        best = min(theirs, key=lambda row: row["ms"])
        assert (ours["peer"], ours["peer_ms"]) == (best["impl"], best["ms"])
        assert ours["speedup"] == pytest.approx(best["ms"] / ours["ms"])
        assert ours["peer_difference"] == best["difference"]
        assert all(row["difference"] < 1e-4 for row in theirs)
    for row in rows:
        assert ("compile_seconds" in row) == (row["impl"] == "transformers-compiled")
    assert "decode-b2-s60: transformers is being compiled" in capsys.readouterr().err


def test_fastest_peer_is_quoted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager images replace the compiled ones, so nothing is compiled
    fake = {"image": latency_peers.EagerImages}
    contenders = {**latency_peers.CONTENDERS, latency_peers.COMPILED_PEER: fake}
    monkeypatch.setattr(latency, "CONTENDERS", contenders)
    told = {"reference": 1.0, "transformers": 8.0, "transformers-compiled": 2.0}

    def tell(calls: dict[str, Any], *_rest: object) -> dict[str, Time]:
        return {name: Time(told[name], told[name], told[name]) for name in calls}

    monkeypatch.setattr(latency, "alternate", tell)
    llm = LLM(tiny, device="cpu", split_images=False)
    peers = {name: transformers_model(llm.model, tiny) for name in list(told)[1:]}
    case = LatencyCase("image", "image-28-b1", 1, sizes=((28, 28),))
    ours, eager, compiled = latency.bench_case(case, llm, peers, "reference", 1)
    assert (ours["peer"], ours["peer_ms"], ours["speedup"]) == ("transformers-compiled", 2.0, 2.0)
    assert (eager["ms"], compiled["ms"]) == (8.0, 2.0)
    told["transformers"] = 0.5
    ours, *_ = latency.bench_case(case, llm, peers, "reference", 1)
    assert (ours["peer"], ours["peer_ms"], ours["speedup"]) == ("transformers", 0.5, 0.5)


@pytest.mark.long
def test_peer_that_fails_to_compile_does_not_end_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_graph: object) -> None:
        raise RuntimeError("no compiler here")

    compile_with(monkeypatch, broken)
    cases = ["--case", "decode-b2-s8", "--case", "prefill-20"]
    options = ["--model", str(tiny), "--steps", "1", "--peer-compile", *cases]
    _, rows = bench(tmp_path / "out.json", "latency", *options)
    peers = ["transformers", "transformers-compiled"]
    assert [row["impl"] for row in rows[:3]] == ["reference", *peers]
    assert rows[0]["peer"] == "transformers"
    assert "no compiler here" in rows[2]["error"]
    assert "ms" not in rows[2]
    assert [row["case"] for row in rows[3:]] == ["prefill-20", "prefill-20"]
    printed = capsys.readouterr().out
    assert "FAILED: BackendCompilerFailed" in printed
    assert re.search(r"\| transformers-compiled \| \S+, float32 \| failed \|", printed)


def test_compiling_needs_a_peer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["latency", "--model", str(tiny), *CPU, "--no-peer", "--peer-compile"]
    assert main(["bench", *arguments]) == 2
    assert "--peer-compile: must come with a peer" in capsys.readouterr().err


def test_latency_on_random_weights(bare: Path, tmp_path: Path) -> None:
    case = ["--case", "decode-b2-s8", "--steps", "1"]
    _, rows = bench(tmp_path / "out.json", "latency", "--random-weights", str(bare), *case)
    assert rows[0]["model"] == "bare (random weights)"
    assert rows[0]["peer_difference"] < 1e-4


def test_load(tiny: Path, bare: Path, tmp_path: Path) -> None:
    _, rows = bench(tmp_path / "out.json", "load", "--random-weights", str(bare))
    assert [(row["case"], row["impl"]) for row in rows] == [
        ("load", "reference"),
        ("load", "transformers"),
    ]
    assert rows[0]["speedup"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"])
    _, rows = bench(tmp_path / "nf4.json", "load", "--model", str(tiny), "--quantization", "nf4")
    assert [(row["case"], row["impl"]) for row in rows] == [("load-nf4", "reference")]


def test_weights_in_nf4(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--case", "decode-b2-s8", "--steps", "1", "--quantization", "nf4"]
    _, rows = bench(tmp_path / "out.json", "latency", "--random-weights", str(bare), *case)
    assert [(row["case"], row["impl"]) for row in rows] == [("decode-b2-s8-nf4", "reference")]
    assert main(["bench", "latency", *CPU, *case, "--peer", "transformers"]) == 2
    assert "cannot be given weights in NF4" in capsys.readouterr().err
    dense, packed = (
        LLM(bare, load_format="dummy", device="cpu", quantization=quantization).model
        for quantization in (None, "nf4")
    )
    assert dense.num_bytes == 4 * sum(p.numel() for p in dense.parameters())
    assert dense.num_bytes > packed.num_bytes > sum(p.nbytes for p in packed.parameters())


def test_cases_beyond_the_model_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case, wanted in (
        ("prefill-512", "513 positions for it, got 512"),
        ("image-980-b1", "at most 112 pixels a side, got 980"),
        ("nothing", "case must be one like decode-b1"),
    ):
        arguments = ["latency", "--model", str(tiny), *CPU, "--no-peer", "--case", case]
        assert main(["bench", *arguments]) == 2
        assert wanted in capsys.readouterr().err


def test_model_with_nan_has_no_time(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.text_model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    model = ["--model", str(broken), *CPU]
    out = tmp_path / "out.json"
    case = ["--case", "decode-b2-s8", "--steps", "1", "--json", str(out)]
    assert main(["bench", "latency", *model, *case]) == 1
    assert not [row for row in json.loads(out.read_text())["rows"] if "ms" in row]
    assert "WRONG" in capsys.readouterr().out
    assert main(["bench", "offline", *model, "--requests", "2", "--shrink", "16", "--no-peer"]) == 2
    assert "logits must be finite, got nan" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_runs_on_the_engines_weights(tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=tied)
    ours = load_checkpoint(tmp_path)
    theirs = transformers_model(ours, tmp_path)
    assert theirs.config._attn_implementation == "sdpa"
    parameters = dict(ours.named_parameters(remove_duplicate=False))
    own = dict(theirs.named_parameters(remove_duplicate=False))
    for place in hub_tensors(ours.config):
        rows = parameters[place.parameter][place.first_row :]
        assert own[place.name].data_ptr() == rows.data_ptr()
        assert own[place.name].shape == place.shape
    assert {parameter.device.type for parameter in own.values()} == {"cpu"}


def test_random_weights_need_no_weight_files(bare: Path) -> None:
    prompt = {"prompt_token_ids": [1, 5, 9]}
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    answers = [
        LLM(bare, load_format="dummy", device="cpu").generate(prompt, params)[0] for _ in range(2)
    ]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
    with pytest.raises(ConfigError, match="load_format must be 'auto' or 'dummy', got 'pickle'"):
        LLM(bare, load_format="pickle")
    with pytest.raises(ConfigError, match="without adapter, verify and check_finite"):
        LLM(bare, load_format="dummy", verify=True)


def test_cpu_is_described_without_measuring() -> None:
    about = machine.describe("cpu")
    assert about["gpu"] is None
    assert about["threads"] == torch.get_num_threads()
    assert not about.keys() & {"copy_TBps", "matmul_TFLOPs"}
    row = {"kernel": "step", "case": "c", "impl": "i", "model": "m", "dtype": "d"}
    assert "| wrong |" in report.whole_table(about, [row])
