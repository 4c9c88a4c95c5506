"""Logs of the engine: loading, recovery, and nothing without a handler or option."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.cli.main import main
from tiny_checkpoint import write_checkpoint

PROMPT = {"prompt_token_ids": [1, 5, 9]}
ROOT = logging.getLogger("idefics2_engine")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "idefics2_engine")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_loading_is_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(tiny, device="cpu", kv_cache_tokens=512)
    size = sum(parameter.nbytes for parameter in llm.model.parameters()) / 1e6
    loaded, cache = caplog.records
    assert loaded.name == "idefics2_engine.checkpoint.loader"
    assert re.fullmatch(
        rf"loaded {re.escape(str(tiny))} in \d+\.\d\d s: files 1, (\d+\.\d) MB; "
        r"adapter None, quantization None, float32 on cpu",
        loaded.getMessage(),
    )
    assert float(loaded.getMessage().split()[7]) == pytest.approx(size, rel=0.05)
    assert cache.name == "idefics2_engine.runtime.kv_cache"
    assert cache.getMessage().startswith(f"KV cache: 512 tokens in {512 // 64} pages, ")


def test_quantization_and_random_weights_are_logged(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LLM(tiny, device="cpu", quantization="nf4")
    assert "adapter None, quantization nf4, float32 on cpu" in caplog.text
    LLM(tiny, device="cpu", load_format="dummy", dtype="bfloat16")
    assert f"drew random weights for {tiny}, quantization None, bfloat16 on cpu" in caplog.text


def test_untied_head_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path, tied=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    embedding = next(weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    save_file({**weights, "lm_head.weight": embedding + 1}, file)
    load_checkpoint(tmp_path)
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"{file}: the head differs from the embedding")


def test_verified_checksums_are_logged(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import hashlib

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  {file.name}\n")
    verify_files(tmp_path, [file])
    assert f"{tmp_path}: 1 files have their published checksums" in caplog.text


def test_steps_are_silent_and_a_cut_off_answer_warns_once(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(tiny, device="cpu")
    caplog.clear()
    llm.generate([PROMPT] * 3, greedy(17))
    llm.generate(PROMPT, greedy(15))
    assert not caplog.records
    llm.generate([PROMPT] * 3, greedy(16))
    llm.generate(PROMPT, greedy(16))
    (warning,) = warnings_in(caplog)
    assert "cut off after 16 tokens, the default of max_tokens" in warning


def test_out_of_memory_logs_the_smaller_steps(
    tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny, device="cpu", max_num_batched_tokens=256)
    run, errors = llm.engine.runner.run, [torch.OutOfMemoryError(), torch.OutOfMemoryError()]

    def fail_twice(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return run(*arguments)

    monkeypatch.setattr(llm.engine.runner, "run", fail_twice)
    patches = llm.engine.scheduler.max_patches
    llm.generate(PROMPT, greedy(2))
    assert warnings_in(caplog) == [
        f"out of memory: steps are halved to 128 tokens and {patches // 2} patches",
        f"out of memory: steps are halved to 64 tokens and {patches // 4} patches",
    ]


def test_failed_step_logs_a_warning(
    tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny, device="cpu")

    def fail(*_arguments: Any) -> Any:
        raise ValueError("no such step")

    monkeypatch.setattr(llm.engine.runner, "run", fail)
    list(llm.iterate([PROMPT, PROMPT], greedy(2), in_flight=1))
    told = warnings_in(caplog)
    assert "request 0: the model must run on it, got ValueError" in told
    assert "request 1: the model must run on it, got ValueError" in told


def test_refused_rows_are_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(tiny, device="cpu")
    rows: list[Any] = [
        PROMPT,
        {"prompt": 7},
        {"prompt": "<image>", "multi_modal_data": {"image": "no.png"}},
    ]
    list(llm.iterate(rows, greedy(2)))
    refused = sorted(r.getMessage() for r in caplog.records if "refused" in r.getMessage())
    assert [text.partition(":")[0] for text in refused] == ["row 1 is refused", "row 2 is refused"]
    assert "no.png" in refused[1]


@pytest.mark.gpu
def test_capture_of_graphs_is_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(tiny, device="cuda", max_num_seqs=9, max_num_batched_tokens=100)
    assert re.search(r"captured \d+ CUDA graphs in \d+\.\d s, -?\d+\.\d\d GB", caplog.text)


def test_nothing_is_printed_without_a_handler(tiny: Path) -> None:
    """Without any handler, Python itself would print a logger's warnings."""
    code = (
        "import sys; from idefics2_engine import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], device='cpu')\n"
        "params = SamplingParams(temperature=0.0, ignore_eos=True)\n"
        "assert llm.generate('a', params)[0].outputs[0].finish_reason == 'length'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestCommandLine:
    @pytest.mark.parametrize(
        ("options", "wanted", "unwanted"),
        [
            ([], [], ["checkpoint.loader", "cut off"]),
            (["-v"], ["INFO idefics2_engine.checkpoint.loader: loaded", "WARNING"], []),
            (["--log-level", "debug"], ["idefics2_engine.runtime.kv_cache: KV cache"], []),
            (["--log-level", "warning"], ["WARNING"], ["checkpoint.loader"]),
            (["--log-level", "error"], [], ["checkpoint.loader", "cut off"]),
        ],
        ids=lambda value: " ".join(value) or "nothing",
    )
    def test_generate_prints_logs_of_the_chosen_level(
        self,
        tiny: Path,
        options: list[str],
        wanted: list[str],
        unwanted: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = ["--model", str(tiny), "--device", "cpu", "--prompt", "a"]
        length = ["--max-tokens", "16", "--min-tokens", "16"]
        level, handlers = ROOT.level, list(ROOT.handlers)
        assert main(["generate", *arguments, *length, *options]) == 0
        assert (ROOT.level, ROOT.handlers) == (level, handlers)
        printed = capsys.readouterr()
        assert "idefics2_engine" not in printed.out
        assert all(text in printed.err for text in wanted)
        assert not any(text in printed.err for text in unwanted)

    def test_chat_and_quantize_print_logs(
        self,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        import io

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
        model = ["--model", str(tiny), "--device", "cpu"]
        assert main(["chat", *model, "--max-tokens", "2", "-v"]) == 0
        assert "INFO idefics2_engine.checkpoint.loader: loaded" in capsys.readouterr().err
        assert main(["quantize", str(tiny), str(tmp_path / "nf4"), "--device", "cpu", "-v"]) == 0
        assert "quantization nf4, bfloat16 on cpu" in capsys.readouterr().err

    @pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
    def test_bench_prints_logs(
        self, tiny: Path, is_before: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        suite = ["latency", "--model", str(tiny), "--device", "cpu", "--no-peer"]
        case = ["--case", "prefill-20", "--steps", "1", "--commit", "abc"]
        options = ["-v", *suite, *case] if is_before else [*suite, "-v", *case]
        assert main(["bench", *options]) == 0
        printed = capsys.readouterr()
        assert "INFO idefics2_engine.checkpoint.loader: loaded" in printed.err
        assert "prefill-20" in printed.out

    def test_invalid_log_options_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        for options in (["--log-level", "loud"], ["-v", "--log-level", "info"]):
            assert main(["generate", "--prompt", "a", *options]) == 2
            assert "--log-level" in capsys.readouterr().err
            assert main(["bench", "latency", *options]) == 2
            assert "--log-level" in capsys.readouterr().err
