"""Summary, manifest and statistics: their content, and that they replace only their own file."""

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import __version__
from idefics2_engine.errors import ImageError
from idefics2_engine.jobs.store.input_files import InputFile
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.writers.manifest import (
    command_without_secrets,
    manifest_of,
)
from idefics2_engine.jobs.writers.own_file import write_json_beside
from idefics2_engine.jobs.writers.stats_file import StatsFile
from idefics2_engine.jobs.writers.summary import RunFigures, summary_of
from idefics2_engine.outputs import RequestMetrics
from job_files import CountedFiles, FailingFiles, Killed, KilledFiles, ShortFiles
from job_outputs import Totals, job_row, request_output

JOB = Totals(10, Counter(media_fetch=1, image=2), 8, 800, 512, 90)
RUN = Totals(4, Counter(image=1), 3, 300, 192, 30)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_summary_has_counts_and_rates(tmp_path: Path) -> None:
    figures = RunFigures(2.0, 1.5, attempts=5, workers=2, patches=99, waits={"read": 0.5})
    summary = summary_of(JOB, RUN, figures)
    out = tmp_path / "out.jsonl"
    assert write_json_beside(out, "summary", "f1", summary) is None
    got = read(tmp_path / "out.jsonl.summary.json")
    assert got["fingerprint"] == "f1"
    assert got["rows"] == {"all": 10, "answered": 7, "errors": 3}
    assert list(got["errors"].items()) == [("image", 2), ("media_fetch", 1)]
    assert got["tokens"] == {"prompt": 800, "image": 512, "completion": 90}
    assert got["bitwise"] is False
    assert got["run"] == {
        "rows": {"all": 4, "answered": 3, "errors": 1},
        "errors": {"image": 1},
        "images": 3,
        "tokens": {"prompt": 300, "image": 192, "completion": 30},
        "patches": 99,
        "attempts": 5,
        "workers": 2,
        "load_seconds": 1.5,
        "seconds": 2.0,
        "per_second": {
            "rows": 2.0,
            "images": 1.5,
            "prompt_tokens": 150.0,
            "completion_tokens": 15.0,
        },
        "waits": {"read": 0.5},
        "advice": None,
    }


def test_run_without_time_has_no_rates() -> None:
    summary = summary_of(JOB, Totals(), RunFigures(0.0))
    assert set(summary["run"]["per_second"].values()) == {None}


def test_file_of_another_job_is_moved_aside(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out.summary.json"
    path.write_text("of the user")
    assert write_json_beside(out, "summary", "f1", {"n": 1}) == tmp_path / "out.summary.json.1"
    # Its own earlier one is replaced
    assert write_json_beside(out, "summary", "f1", {"n": 2}) is None
    assert read(path)["n"] == 2
    assert write_json_beside(out, "summary", "f2", {"n": 3}) == tmp_path / "out.summary.json.2"
    assert [read(path)["n"], read(tmp_path / "out.summary.json.2")["n"]] == [3, 2]
    assert (tmp_path / "out.summary.json.1").read_text() == "of the user"
    # A manifest is no summary, and a link is nobody's
    link = tmp_path / "out.manifest.json"
    link.symlink_to(path)
    assert write_json_beside(out, "manifest", "f2", {}) == tmp_path / "out.manifest.json.1"
    assert read(path)["n"] == 3


def test_kill_leaves_the_old_or_the_new_summary(tmp_path: Path) -> None:
    for at in range(6):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        write_json_beside(out, "summary", "f1", {"n": 1})
        try:
            write_json_beside(out, "summary", "f1", {"n": 2}, KilledFiles(at, 0.5))
        except Killed:
            assert at < 5
        path = out.with_name("out.summary.json")
        assert read(path)["n"] == (1 if at < 4 else 2)
        write_json_beside(out, "summary", "f1", {"n": 3})
        assert read(path)["n"] == 3


def test_manifest_says_what_the_output_was_made_from(tmp_path: Path) -> None:
    job = JobDescription(
        {"model": {"dtype": "float32"}},
        (InputFile("in.jsonl", 5, 6),),
        {"window": 4},
        ({"model": {"dtype": "float16"}},),
    )
    output = WrittenOutput(3, 99, "ab" * 32)
    manifest = manifest_of(job, output, device={"name": "cpu"}, command=["idefics2", "run"])
    write_json_beside(tmp_path / "out", "manifest", job.fingerprint, manifest)
    got = read(tmp_path / "out.manifest.json")
    assert got["fingerprint"] == job.fingerprint
    assert got["parts"] == job.parts
    assert got["inputs"] == [{"path": "in.jsonl", "size": 5, "mtime_ns": 6}]
    assert got["accepted"][0]["parts"] == {"model": {"dtype": "float16"}}
    assert got["accepted"][0]["fingerprint"] != job.fingerprint
    assert got["output"] == {"rows": 3, "size": 99, "sha256": "ab" * 32}
    assert got["versions"]["idefics2-engine"] == __version__
    assert {"python", "torch", "numpy"} <= got["versions"].keys()
    assert (got["device"], got["options"]) == ({"name": "cpu"}, {"window": 4})
    assert got["command"] == ["idefics2", "run"]


def test_command_has_no_secrets() -> None:
    command = [
        *("idefics2", "run", "-i", "s3://me:SECRET@bucket/in.jsonl?sig=SECRET#SECRET"),
        *("--hf-token", "SECRET", "--api_key=SECRET", "--password", "--SECRET"),
        *("--max-tokens", "5", "--save=token_ids", "--prompt", "Bearer SECRET"),
        "hf_SECRETSECRETSECRETSECRET",
    ]
    shown = command_without_secrets(command)
    assert "SECRET" not in " ".join(shown)
    assert shown == [
        *("idefics2", "run", "-i", "s3://***@bucket/in.jsonl?***"),
        *("--hf-token", "***", "--api_key=***", "--password", "***"),
        *("--max-tokens", "5", "--save=token_ids", "--prompt", "***"),
        "***",
    ]


def test_stats_have_a_line_for_each_row(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with_times = request_output(metrics=RequestMetrics(10.0, 10.5, 12.0))
    failed = request_output(
        metrics=RequestMetrics(10.0, None, None), error=ImageError("no"), outputs=[], image_info=()
    )
    stats = StatsFile(out, is_new=True, clock=lambda: 5.00049)
    stats.add(job_row(1), failed, attempts=2, worker=3)
    stats.add(job_row(0, id="a"), with_times)
    stats.close()
    stats.close()
    lines = [json.loads(line) for line in (tmp_path / "out.stats.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "row": 0,
        "id": "a",
        "error": None,
        "time": 5.0,
        "first_token_seconds": 0.5,
        "seconds": 2.0,
        "prompt_tokens": 4,
        "cached_tokens": 2,
        "completion_tokens": 2,
        "images": 1,
        "patches": 12,
        "attempts": 1,
        "worker": None,
    }
    assert (lines[0]["error"], lines[0]["seconds"]) == ("image", None)
    assert (lines[0]["attempts"], lines[0]["worker"]) == (2, 3)


def test_stats_are_continued_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out.stats.jsonl"
    path.write_bytes(b'{"row":1}\n{"ro')
    stats = StatsFile(out, is_new=False, files=ShortFiles(7))
    stats.add(job_row(2), request_output())
    stats.close()
    first, cut, last = path.read_bytes().splitlines()
    assert (first, cut) == (b'{"row":1}', b'{"ro')
    assert json.loads(last)["row"] == 2
    again = StatsFile(out, is_new=True)
    again.close()
    assert again.moved == tmp_path / "out.stats.jsonl.1"
    assert path.read_bytes() == b""


def test_lines_are_written_together(tmp_path: Path) -> None:
    files = CountedFiles()
    stats = StatsFile(tmp_path / "out", is_new=True, files=files)
    for number in range(1000):
        stats.add(job_row(number), request_output())
    assert 1 <= files.calls.count("write") <= 10
    stats.flush()
    assert len((tmp_path / "out.stats.jsonl").read_bytes().splitlines()) == 1000
    stats.close()


def test_stats_that_cannot_be_written_are_closed(tmp_path: Path) -> None:
    stats = StatsFile(tmp_path / "out", is_new=True, files=FailingFiles(errno.ENOSPC, range(1, 2)))
    stats.add(job_row(), request_output())
    with pytest.raises(OSError, match="No space left"):
        stats.flush()
    stats.add(job_row(), request_output())
    stats.close()
