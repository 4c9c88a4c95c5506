"""The command's output has the same bytes with any number of workers, and from merged shards."""

import json
from pathlib import Path

import pytest

from idefics2_engine.cli import main
from idefics2_engine.demo import DEMO_IMAGES

ROWS = 14


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pictures = sorted(path.name for path in DEMO_IMAGES.glob("*.png"))
    lines = [
        {"id": f"q{number}", "images": [pictures[number % len(pictures)]], "prompt": f"{number}?"}
        for number in range(ROWS)
    ]
    lines[5]["images"] = ["missing.png"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source: Path, name: str, *options: str) -> Path:
    """Run the command with an error row, whose exit code is 3."""
    out = source.parent / name
    arguments = ["run", "-i", str(source), "-o", str(out), "--media-root", str(DEMO_IMAGES)]
    sampling = ["--device", "cpu", "--max-tokens", "4", "--temperature", "0.7"]
    assert main.main([*arguments, *sampling, *options]) in (0, 3)
    return out


@pytest.mark.long
@pytest.mark.parametrize("workers", ["2", "3"])
def test_workers_change_no_byte(source: Path, workers: str) -> None:
    one = run(source, "one.jsonl")
    assert run(source, "some.jsonl", "--workers", workers).read_bytes() == one.read_bytes()
    assert one.read_bytes().count(b"\n") == ROWS


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.jsonl", ()),
        ("out.jsonl.gz", ("--save", "token_ids")),
        ("results.jsonl", ("--output-format", "openai")),
    ],
)
def test_merged_shards_change_no_byte(source: Path, name: str, options: tuple[str, ...]) -> None:
    whole = run(source, name, *options)
    shards = [
        str(run(source, f"{index}-{name}", "--shard", f"{index}/3", *options)) for index in range(3)
    ]
    merged = source.parent / f"merged-{name}"
    assert main.main(["merge", *shards, "-o", str(merged)]) == 0
    assert merged.read_bytes() == whole.read_bytes()
