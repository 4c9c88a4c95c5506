"""``idefics2 run`` with a stand-in engine, and a job of the demo checkpoint."""

import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from idefics2_engine import device
from idefics2_engine.cli.jobs import run_job
from idefics2_engine.cli.jobs.check import check_input
from idefics2_engine.cli.jobs.run_options import size
from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError
from paths import ROOT
from stand_in_run import StandInEngine

TEXTS = ["first", "second", "third"]


class Choice:
    """Stands for ``EngineChoice``."""

    engine = StandInEngine()
    workers = 1

    def __init__(self, *_args: object) -> None:
        pass

    def __call__(self) -> StandInEngine:
        return self.engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandInEngine:
    found = StandInEngine()
    monkeypatch.setattr(Choice, "engine", found)
    monkeypatch.setattr(run_job, "EngineChoice", Choice)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", TEXTS)


def write(path: Path, texts: Sequence[str], *more: str) -> Path:
    lines = [json.dumps({"id": text, "prompt": text}) for text in texts]
    path.write_text("".join(f"{line}\n" for line in [*lines, *more]))
    return path


def command(source: Path, *more: str) -> int:
    return main(["run", "-i", str(source), "-o", str(source.with_name("out.jsonl")), *more])


def output(source: Path) -> list[dict[str, Any]]:
    lines = source.with_name("out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.usefixtures("engine")
def test_rows_are_answered_in_order(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(source) == 0
    assert [row["id"] for row in output(source)] == TEXTS
    said = capsys.readouterr()
    assert "out.jsonl is complete: 3 rows, 0 errors" in said.out
    assert "\n3 rows were finished in " in said.out


def test_finished_job_says_so(
    source: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    command(source)
    capsys.readouterr()
    assert command(source) == 0
    assert capsys.readouterr().out.endswith("out.jsonl is complete: 3 rows\n")
    assert engine.loads == 1


@pytest.mark.usefixtures("engine")
def test_merging_of_the_adapter_is_part_of_the_job(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    named = ("--adapter", str(adapter))
    assert command(source, *named, "--no-merge-adapter") == 0
    assert command(source, *named, "--no-merge-adapter") == 0
    assert command(source, *named) == 2
    assert "merge_adapter" in capsys.readouterr().err


def test_bad_rows_become_error_rows(
    tmp_path: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS, "{", "[]")
    assert command(source) == 3
    assert [row["error"] and row["error"]["code"] for row in output(source)[3:]] == [
        "json",
        "schema",
    ]
    said = capsys.readouterr().err
    assert "2 of 5 rows are bad: " in said
    assert "in.jsonl: line 4: json: " in said
    assert engine.asked.total() == 3


@pytest.mark.usefixtures("engine")
def test_folder_of_missing_images_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"{i}", "images": [f"{i}.png"], "prompt": "?"} for i in range(2)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert command(source, "--on-bad-row", "stop") == 2
    said = capsys.readouterr().err
    assert said.count("cannot be read as an image: no such file") == 2
    hint = f"images are looked for in {tmp_path}; --media-root names another folder"
    assert said.count(hint) == 1
    source.write_text("{")
    assert command(source, "--on-bad-row", "stop") == 2
    assert "--media-root" not in capsys.readouterr().err


def test_bad_rows_can_stop_the_job_before_the_model_is_loaded(
    tmp_path: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS, "{")
    assert command(source, "--on-bad-row", "stop") == 2
    assert "line 4" in capsys.readouterr().err
    assert engine.loads == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_repeated_ids_stop_the_job(
    tmp_path: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", ["same", "other", "same"])
    assert command(source) == 2
    said = capsys.readouterr().err.replace(str(tmp_path), "")
    assert "'same': /in.jsonl: line 1 and /in.jsonl: line 3" in said
    assert command(source, "--on-duplicate-id", "suffix") == 0
    assert engine.asked.total() == 3


def test_other_options_are_another_job(
    source: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    command(source)
    assert command(source, "--temperature", "0.5") == 2
    said = capsys.readouterr().err
    assert "sampling.temperature  0.0      0.5" in said
    assert command(source, "--temperature", "0.5", "--force-resume") == 0
    assert engine.loads == 1
    assert command(source, "--temperature", "0.7", "--restart") == 0
    assert engine.loads == 2
    assert source.with_name("out.jsonl.job.1").is_dir()


def test_options_that_change_no_answer_do_not_matter(source: Path, engine: StandInEngine) -> None:
    command(source)
    source.with_name("out.jsonl").unlink()
    same = ("--in-flight", "3", "--window", "9", "--max-num-seqs", "2", "--retries", "0")
    assert command(source, *same) == 0
    assert engine.loads == 1


def test_retry_errors(tmp_path: Path, engine: StandInEngine) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS)
    text = str([{"role": "user", "content": [{"type": "text", "text": "second"}]}])
    engine.failures[text] = ["image", "prompt"]
    assert command(source) == 3
    assert command(source, "--retry-errors=prompt") == 3
    assert engine.asked[text] == 1
    assert command(source, "--retry-errors=image,prompt") == 3
    assert command(source, "--retry-errors") == 0
    assert engine.asked[text] == 3


def test_options_may_change_before_the_first_row(source: Path, engine: StandInEngine) -> None:
    """A model that cannot be loaded with an option leaves a job without rows."""
    engine.fails_to_load = ConfigError("max_model_len must be from 2")
    assert command(source, "--max-model-len", "9") == 2
    engine.fails_to_load = None
    assert command(source) == 0


@pytest.mark.usefixtures("engine")
def test_files_beside_the_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS, "{")
    page = tmp_path / "page.html"
    assert command(source, "--stats", "--report", str(page)) == 3
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["rows"] == {"all": 4, "answered": 3, "errors": 1}
    assert summary["errors"] == {"json": 1}
    assert summary["run"]["attempts"] == 3
    assert summary["bitwise"] is True
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["output"]["rows"] == 4
    assert manifest["fingerprint"] == summary["fingerprint"]
    assert manifest["parts"]["engine"]["device"] == "cpu"
    lines = (tmp_path / "out.jsonl.stats.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(TEXTS)
    assert all(text in page.read_text() for text in TEXTS)


def test_lost_summary_is_written_again(tmp_path: Path, engine: StandInEngine) -> None:
    """A kill may come between the output and the files beside it."""
    source = write(tmp_path / "in.jsonl", TEXTS)
    command(source)
    summary = tmp_path / "out.jsonl.summary.json"
    counts = json.loads(summary.read_text())["rows"]
    summary.unlink()
    assert command(source) == 0
    assert json.loads(summary.read_text())["rows"] == counts
    assert engine.loads == 1


def test_finished_job_shows_its_rows(
    source: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    command(source)
    summary = source.with_name("out.jsonl.summary.json")
    figures = summary.read_text()
    capsys.readouterr()
    page = source.with_name("page.html")
    assert command(source, "--report", str(page), "--show", "2") == 0
    assert all(text in page.read_text() for text in TEXTS)
    assert TEXTS[0] in capsys.readouterr().out
    assert (engine.loads, summary.read_text()) == (1, figures)
    # The page is there, and the job has nothing to do
    assert command(source, "--report", str(page)) == 0
    assert "is complete: 3 rows\n" in capsys.readouterr().out
    # With fewer rows the summary is another one
    write(source, TEXTS[:2])
    assert command(source) == 0
    assert json.loads(summary.read_text())["rows"]["all"] == 2


@pytest.mark.usefixtures("engine")
def test_summary_counts_the_whole_job_and_the_last_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS)
    command(source)
    assert "since the last start" not in capsys.readouterr().out
    write(source, [*TEXTS, "fourth"])
    assert command(source) == 0
    assert f"input {source}: grown since the last start" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["rows"]["all"] == 4
    assert summary["run"]["rows"]["all"] == 1


@pytest.mark.usefixtures("engine")
def test_forms_of_the_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "out.jsonl.gz"
    assert main(["run", "-i", str(source), "-o", str(out)]) == 0
    assert len(gzip.decompress(out.read_bytes()).splitlines()) == 3
    assert command(source, "--output-format", "openai") == 0
    assert [row["custom_id"] for row in output(source)] == TEXTS


@pytest.mark.usefixtures("engine")
def test_status(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(source.with_name("out.jsonl"))
    assert main(["run", "--status", out]) == 2
    assert f"there is no job for {out}" in capsys.readouterr().err
    command(source)
    capsys.readouterr()
    assert main(["run", "--status", out]) == 0
    assert "3 of 3 rows are in the journal, the job is complete" in capsys.readouterr().out
    assert main(["run", "--status", out, "--log-format", "json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["rows"], status["of"], status["complete"]) == (3, 3, True)


@pytest.mark.usefixtures("engine")
def test_lines_of_progress(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(source, "--progress-interval", "0", "--log-format", "json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["rows"] for line in lines] == [1, 2, 3]
    assert {line["of"] for line in lines} == {3}
    assert lines[-1]["seconds_left"] == 0
    command(source, "--restart", "--progress-interval", "0")
    assert "idefics2: 2 of 3 rows, 0 errors, " in capsys.readouterr().err


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("stream", ["closed", "full"])
def test_lost_standard_output_is_no_error(
    source: Path, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stream == "closed":
        monkeypatch.setattr(sys, "stdout", None)
        assert command(source) == 0
    else:
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert command(source) == 0
    assert len(output(source)) == 3


def test_standard_input(
    tmp_path: Path,
    engine: StandInEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    text = write(tmp_path / "in.jsonl", TEXTS).read_bytes()
    for content in (text, text, b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["run", "-i", "-", "-o", str(out)]) == 0
        assert "is complete: 3 rows" in capsys.readouterr().out
    assert engine.loads == 1
    assert len(output(out)) == 3
    # It is in the folder that would be moved aside
    assert main(["run", "-i", "-", "-o", str(out), "--restart"]) == 2
    assert "standard input, which is kept in the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--window", "0"], "window must be an integer from 1"),
        (["--max-errors", "many"], "max_errors must be a number of rows or a percentage"),
        (["--workers", "many"], "--workers must be auto or a number from 1"),
        (["--prompt", "a", "--prompt-template", "b"], "prompt must come without prompt_template"),
        (["--max-prepared-bytes", "much"], "expected bytes such as 500MB"),
        (["--restart", "--force-resume"], "not allowed with"),
    ],
)
def test_invalid_options(
    source: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(source, *more) == 2
    assert message in capsys.readouterr().err


def test_input_and_output_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-o", "out.jsonl"]) == 2
    assert "-i IN -o OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "bytes_"), [("500MB", 500_000_000), ("2GiB", 2 << 30), ("7", 7), ("1k", 1000)]
)
def test_size(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


def test_deterministic_job_is_refused_on_a_gpu(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "torch_device", lambda _name: torch.device("cuda"))
    assert command(source, "--deterministic") == 2
    assert "--deterministic must come with --device cpu, got cuda" in capsys.readouterr().err


def test_demo_questions_are_answered(tmp_path: Path) -> None:
    """The job of ``make demo``, whose answers are those of the images' own list."""
    out = tmp_path / "answers.jsonl"
    questions = ROOT / "examples/jobs/questions.jsonl"
    assert (
        main(["run", "-i", str(questions), "-o", str(out), "--media-root", str(DEMO_IMAGES)]) == 0
    )
    known = {
        (tuple(entry["images"]), entry["turns"][0][0]): entry["turns"][0][1]
        for entry in json.loads((DEMO_IMAGES / "questions.json").read_text())
    }
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert len(rows) == 12
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        assert answer["id"] == row["id"]
        assert answer["outputs"][0]["text"] == known[tuple(row["images"]), row["prompt"]]


@pytest.mark.parametrize("more", [[], ["--output-format", "openai"]])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_merged_shards_are_the_whole_job(
    tmp_path: Path,
    more: list[str],
    suffix: str,
    engine: StandInEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS, "{")
    outs = [tmp_path / f"{name}.{suffix}" for name in ("whole", "first", "second", "merged")]
    for out, shard in zip(outs, ["0/1", "0/2", "1/2"], strict=False):
        run_shard = ["run", "-i", str(source), "-o", str(out), "--shard", shard]
        assert main([*run_shard, *more]) in (0, 3)
    assert main(["merge", str(outs[1]), str(outs[2]), "-o", str(outs[3])]) == 0
    assert outs[3].read_bytes() == outs[0].read_bytes()
    asked = engine.asked.total()
    again = ["run", "-i", str(source), "-o", str(outs[3]), *more]
    assert main(again) == 0
    assert "is complete: 4 rows" in capsys.readouterr().out
    # Its rows are in the journals of the shards, so a run could only compute all of them
    assert main([*again, "--retry-errors"]) == 2
    said = "a job that continues must have a journal, got a merged output"
    assert said in capsys.readouterr().err
    write(source, [*TEXTS, "more"])
    assert main(again) == 2
    assert said in capsys.readouterr().err
    assert engine.asked.total() == asked


def test_images_are_checked_before_the_model_is_loaded(
    tmp_path: Path, engine: StandInEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(bytes(2000))
    rows = [{"prompt": name, "images": [f"{name}.png"]} for name in ("a", "none")]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    stop = ("--on-bad-row", "stop")
    assert command(source, *stop) == 2
    assert "1 of 2 rows are bad: 1 image" in capsys.readouterr().err
    # The rules are those of the engine
    assert command(source, *stop, "--max-media-bytes", "1000") == 2
    assert "2 of 2 rows are bad: 2 image" in capsys.readouterr().err
    assert command(source, *stop, "--check-images", "none") == 0
    assert engine.loads == 1
    # The engine has the last word about a row that goes on
    assert command(source) == 0


def test_an_unchanged_input_is_checked_once(
    source: Path, engine: StandInEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[object] = []

    def check(*args: Any) -> Any:
        checks.append(args)
        return check_input(*args)

    def checks_of(*more: str) -> int:
        before = len(checks)
        source.with_name("out.jsonl").unlink(missing_ok=True)
        assert command(source, *more) == 0
        assert [row["id"] for row in output(source)] == texts
        return len(checks) - before

    monkeypatch.setattr(run_job, "check_input", check)
    texts = TEXTS
    assert checks_of() == 1
    assert checks_of() == 0
    assert checks_of("--on-bad-row", "stop") == 1
    assert checks_of("--check-images", "header") == 1
    assert checks_of("--check-images", "header") == 0
    texts = [*TEXTS, "more"]
    write(source, texts)
    assert checks_of("--check-images", "header") == 1
    assert checks_of("--check-images", "header", "--restart") == 1
    assert engine.asked.total() == 2 * len(texts)


def test_table_without_an_image_is_noticed(
    engine: StandInEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "in.csv").write_text("file,title\na.png,square\n")
    command = ["run", "-i", str(tmp_path / "in.csv"), "--prompt", "What is {title}?"]
    assert main([*command, "-o", str(tmp_path / "text.jsonl")]) == 0
    notice = "no row of the table has an image; --image-column names their column"
    assert notice in capsys.readouterr().err
    assert main([*command, "--image-column", "file", "-o", str(tmp_path / "out.jsonl")]) == 0
    assert notice not in capsys.readouterr().err


def test_images_without_a_question_are_refused_before_a_job_is_made(
    engine: StandInEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    out = tmp_path / "out.jsonl"
    assert main(["run", "-i", str(tmp_path / "images"), "-o", str(out)]) == 2
    assert "need a question for all of them" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.job").exists()


def test_complete_job_says_its_errors_again(
    engine: StandInEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n{\n')
    command = ["run", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(command) == 3
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.endswith("is complete: 2 rows, 1 error; --retry-errors computes these again\n")
