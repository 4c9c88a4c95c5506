"""A plan has the counts of the run: rows, errors by code, images, tokens and patches."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli.main import main
from pictures import file, frames, noise, oriented, png_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    pictures = {
        "a.png": file(noise(64, 48), "PNG"),
        "wide.jpg": file(noise(400, 60), "JPEG"),
        "turned.jpg": oriented(noise(30, 200), "JPEG", 6),
        "frames.gif": frames("GIF"),
        "dot.png": file(noise(1, 1), "PNG"),
        "huge.png": png_file(65535, 65535, b""),
    }
    for name, data in pictures.items():
        (root / name).write_bytes(data)
    (root / "same.png").write_bytes(pictures["a.png"])
    (root / "text.png").write_text("no image")
    return root


def rows(folder: Path) -> list[Any]:
    data = base64.b64encode((folder / "turned.jpg").read_bytes()).decode()
    two = {"id": "two answers", "images": ["wide.jpg"], "prompt": "Two?", "sampling": {"n": 2}}
    return [
        {"id": "one", "images": ["a.png"], "prompt": "What is this?"},
        {"id": "again", "images": ["same.png"], "prompt": "What is this?"},
        {"id": "several", "images": ["wide.jpg", "turned.jpg", "dot.png"], "prompt": "Which?"},
        {"id": "frames", "images": ["frames.gif"], "prompt": "How many?"},
        {"id": "data", "images": [f"data:image/jpeg;base64,{data}"], "prompt": "And this?"},
        {"id": "text", "prompt": "No image <image>"},
        two,
        {"id": "limit", "images": ["a.png"], "prompt": "Less", "sampling": {"max_tokens": 1}},
        {"id": "missing", "images": ["a.png", "missing.png"], "prompt": "x"},
        {"id": "huge", "images": ["huge.png"], "prompt": "x"},
        {"id": "no image", "images": ["text.png"], "prompt": "x"},
        {"id": "outside", "images": ["../in.jsonl"], "prompt": "x"},
        {"id": "host", "images": ["https://example.org/a.png"], "prompt": "x"},
        {"id": "long", "prompt": "word " * 900},
        {"id": "many", "images": ["dot.png"] * 30, "prompt": "x"},
        {"id": "none"},
        {"id": "key", "prompt": "x", "other": 1},
        {"id": "hot", "prompt": "x", "sampling": {"temperature": -1}},
        {"id": "words", "prompt": "x", "sampling": {"allowed_token_ids": [10**6]}},
        {"id": "half", "prompt": "\ud800"},
        "no object",
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--no-split"],
        ["--split", "--shard", "1/2"],
        ["--sample", "9", "--n", "2", "--temperature", "0.5"],
    ],
)
def test_counts_of_the_plan_are_those_of_the_run(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder.with_name("in.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    out = folder.with_name("out.jsonl")
    given = ["-i", str(source), "--media-root", str(folder), "--max-tokens", "2"]
    given += ["--max-model-len", "512", "--check-images", "header", *options]
    assert main(["plan", "--json", *given]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert main(["run", "-o", str(out), "--device", "cpu", *given]) == 3
    summary = json.loads(out.with_name("out.jsonl.summary.json").read_text())
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert plan["rows"] == {
        "total": summary["rows"]["all"],
        "answered": summary["rows"]["answered"],
        "failing": summary["rows"]["errors"],
    }
    assert {code: found["rows"] for code, found in plan["failures"].items()} == summary["errors"]
    for code, found in plan["failures"].items():
        for example in found["examples"]:
            (row,) = (row for row in answered if row["row"] == example["row"])
            assert (row["id"], row["error"]["code"]) == (example["id"], code)
            assert row["error"]["message"] == example["message"]
    counts = {name: count["total"] for name, count in plan["counts"].items()}
    assert counts["images"] == summary["images"] > 0
    assert counts["prompt_tokens"] == summary["tokens"]["prompt"]
    assert counts["image_tokens"] == summary["tokens"]["image"] > 0
    assert counts["patches"] == summary["run"]["patches"]
    used = [row["usage"]["prompt_tokens"] for row in answered if row["usage"]]
    assert plan["counts"]["prompt_tokens"]["max"] == max(used)
    assert plan["counts"]["prompt_tokens"]["min"] == min(used)
