"""The command ``idefics2 plan``: its table, its JSON and its exit codes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli.main import main
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.rows.row_builder import IdentifiedRow
from paths import EIGHT_B, ROOT
from pictures import file, noise

ROWS: list[dict[str, Any]] = [
    {"id": "a", "images": ["a.png"], "prompt": "What is this?"},
    {"id": "b", "images": ["a.png", "b.jpg"], "prompt": "What differs?"},
    {"id": "c", "prompt": "No image"},
]
RATES = str(ROOT / "bench/results/h100-latency.json")
BAD: list[dict[str, Any]] = [
    {"id": "d", "images": ["none.png"], "prompt": "Missing?"},
    {"id": "e", "images": ["../x.png"], "prompt": "Outside?"},
    {"id": "f", "images": ["text.png"], "prompt": "Text?"},
    {"id": "g", "prompt": "word " * 9000},
    {"id": "h"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(file(noise(64, 48), "PNG"))
    (tmp_path / "b.jpg").write_bytes(file(noise(300, 100), "JPEG"))
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", "--json", *arguments])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


COUNT = {"total": int, "min": int, "median": int, "p95": int, "max": int}
PEAK = {"likely": int, "bound": int}
SCHEMA: dict[str, Any] = {
    "rows": {"total": int, "answered": int, "failing": int},
    "failures": {},
    "longest_unfit_prompt": type(None),
    "max_model_len": int,
    "counts": dict.fromkeys(
        (
            "images",
            "tiles",
            "patches",
            "image_tokens",
            "text_tokens",
            "prompt_tokens",
            "max_new_tokens",
        ),
        COUNT,
    ),
    "unread_images": int,
    "short_max_tokens": int,
    "cached_prompt_tokens": int,
    "encoded": {"tiles": int, "patches": int},
    "kv_cache": {
        "dtype": str,
        "page_tokens": int,
        "page_bytes": int,
        "max_num_seqs": int,
        "pages_per_sequence": COUNT,
        "peak_pages": PEAK,
        "peak_bytes": PEAK,
        "pages": type(None),
    },
    "time": type(None),
    "repeated_ids": {"rows": int, "examples": list},
}


def check_schema(value: Any, schema: Any) -> None:
    if isinstance(schema, dict):
        assert list(value) == list(schema)
        for name, inner in schema.items():
            check_schema(value[name], inner)
    else:
        assert type(value) is schema


def test_json_has_all_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, "-i", write(folder, ROWS), "--max-tokens", "9", "--no-split")
    assert code == 0
    check_schema(plan, SCHEMA)
    assert plan["rows"] == {"total": 3, "answered": 3, "failing": 0}
    assert plan["counts"]["images"] == {"total": 3, "min": 0, "median": 1, "p95": 2, "max": 2}
    assert plan["counts"]["max_new_tokens"]["total"] == 27
    assert plan["encoded"]["tiles"] == 2


def test_failing_rows_have_codes_and_places(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = planned(capsys, "-i", write(folder, ROWS + BAD))
    assert code == 3
    assert plan["rows"] == {"total": 8, "answered": 3, "failing": 5}
    failures = {code: found["rows"] for code, found in plan["failures"].items()}
    assert failures == {"image": 2, "media_not_allowed": 1, "prompt_too_long": 1, "schema": 1}
    example = plan["failures"]["media_not_allowed"]["examples"][0]
    assert (example["id"], example["row"]) == ("e", 4)
    assert example["place"].endswith("line 5")
    found = [one for failures in plan["failures"].values() for one in failures["examples"]]
    assert len(found) == 5
    assert not any(str(folder) in one["message"] for one in found)
    assert plan["longest_unfit_prompt"] > 9000


def test_table_names_rows_codes_and_pages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-i", write(folder, ROWS + BAD), "--rates", RATES]) == 3
    said = capsys.readouterr().out
    for words in (
        "rows: 8, of which 5 will fail",
        "image tokens",
        "image: 2 rows, such as",
        "p95",
        "media_not_allowed: 1 row, such as",
        "the longest prompt has 9,0",
        "KV cache with 256 sequences at once: likely",
        "on NVIDIA H100 80GB HBM3 with idefics2-8b (random weights)",
    ):
        assert words in said, said


def test_time_needs_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(folder, ROWS)
    _, plan = planned(capsys, "-i", rows, "--model", str(EIGHT_B), "--rates", RATES)
    time = plan["time"]
    assert 0 < time["low"] < time["seconds"] < time["high"]
    _, short = planned(
        capsys, "-i", rows, "--model", str(EIGHT_B), "--rates", RATES, "--expected-tokens", "4"
    )
    assert short["time"]["decode"] < time["decode"]
    assert short["time"]["prompts"] == time["prompts"]


def test_options_change_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(folder, ROWS)
    _, whole = planned(capsys, "-i", rows, "--no-split")
    _, split = planned(capsys, "-i", rows, "--split", "--dtype", "float32", "--max-num-seqs", "2")
    assert split["counts"]["tiles"]["total"] == 5 * whole["counts"]["tiles"]["total"]
    assert split["kv_cache"]["page_bytes"] == 2 * whole["kv_cache"]["page_bytes"]
    assert split["kv_cache"]["max_num_seqs"] == 2
    code, unread = planned(capsys, "-i", rows, "--check-images", "none", "--limit", "2")
    assert (code, unread["rows"]["total"], unread["unread_images"]) == (0, 2, 3)
    code, plan = planned(capsys, "-i", rows, "--max-image-pixels", str(64 * 48))
    assert (code, plan["failures"]["image"]["rows"]) == (3, 1)
    _, plan = planned(capsys, "-i", rows, "--kv-cache-tokens", "4096", "--max-model-len", "512")
    assert (plan["kv_cache"]["pages"], plan["max_model_len"]) == (64, 512)


def test_repeated_ids_are_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(folder, [*ROWS, ROWS[0]])
    code, plan = planned(capsys, "-i", rows)
    assert (code, plan["repeated_ids"]["rows"]) == (2, 1)
    assert plan["repeated_ids"]["examples"][0]["id"] == "a"
    assert main(["plan", "-i", rows]) == 2
    assert "repeated ids: 1 row that a run refuses" in capsys.readouterr().out
    code, plan = planned(capsys, "-i", rows, "--on-duplicate-id", "suffix")
    assert (code, plan["repeated_ids"]["rows"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a plan must have an input: -i IN"),
        (("-i", "nothing.jsonl"), "nothing.jsonl"),
        (("--max-model-len", "1"), "max_model_len must be an integer from 2"),
        (("--max-model-len", "999999"), "max_model_len must be from 2 to the model's"),
        (("--expected-tokens", "0"), "expected_tokens must be an integer from 1"),
        (("--rates", "nothing.json"), "nothing.json: cannot be read"),
        (("--rates", RATES, "--quantization", "nf4"), "quantized, and does not"),
        (("--max-tokens", "0"), "max_tokens must be an integer of at least 1"),
        (("--check-images", "all"), "invalid choice: 'all'"),
        (("--model", "no/such/model"), "no such folder, and no hub id"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    rows = () if not arguments or arguments[0] == "-i" else ("-i", write(folder, ROWS))
    assert main(["plan", *rows, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_input_that_is_lost_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*_arguments: object) -> Iterator[IdentifiedRow]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield

    monkeypatch.setattr(JobInput, "identified_rows", rows)
    assert main(["plan", "-i", write(folder, ROWS)]) == 2
    assert "the input cannot be read: Input/output error" in capsys.readouterr().err


def test_standard_input_is_planned(folder: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    done = subprocess.run(
        [sys.executable, "-m", "idefics2_engine", "plan", "-i", "-", "--json"],
        input=rows,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["total"] == 3


def test_command_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from idefics2_engine.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert not {'torch', 'triton'} & sys.modules.keys(), 'torch is imported'\n"
        "sys.exit(code)\n"
    )
    rows = write(folder, ROWS)
    command = [sys.executable, "-c", program, "plan", "-i", rows, "--rates", RATES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
