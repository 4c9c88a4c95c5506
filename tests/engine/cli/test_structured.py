"""Options of structured output, and jobs whose answers have to satisfy a constraint."""

import json
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.cli.main import main
from idefics2_engine.demo import DEMO_IMAGES

IMAGE = str(DEMO_IMAGES / "shapes.png")
QUESTION = "Where is the star?"
SCHEMA = {
    "type": "object",
    "properties": {"where": {"enum": ["top right", "left"]}, "sure": {"type": "boolean"}},
    "required": ["where", "sure"],
    "additionalProperties": False,
}


def generate(*options: str) -> int:
    return main(["generate", "--device", "cpu", "--image", IMAGE, "--prompt", QUESTION, *options])


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    return path


def test_generate_follows_each_option(
    schema: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grammar = tmp_path / "a.lark"
    grammar.write_text('start: "x" | "y"')
    for options, fits in (
        (["--choice", "at the left", "--choice", "at the right"], ("at the left", "at the right")),
        (["--regex", "[ab]"], ("a", "b")),
        (["--grammar", str(grammar)], ("x", "y")),
    ):
        assert generate(*options) == 0
        assert capsys.readouterr().out.strip() in fits
    assert generate("--json-schema", str(schema)) == 0
    assert json.loads(capsys.readouterr().out)["where"] in ("top right", "left")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "(?=a)"], "regex must be a constraint that can be enforced whole"),
        (["--json-schema", "no.json"], "--json-schema must name a file in UTF-8, got no.json"),
        (["--choice", "a", "--choice", "a"], "choice must be a list of 1 to 10000 strings"),
        (["--choice", "a", "--stop", "b"], "stop must be absent with structured_outputs"),
        (["--choice", "a", "--regex", "b"], "not allowed with argument"),
    ],
)
def test_refusal_comes_before_the_model(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("idefics2_engine.cli.options.loaded_llm", loaded)
    try:
        code = generate(*options)
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def rows_of(path: Path) -> dict[str, Any]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    samplings: dict[str, dict[str, Any]] = {
        "job": {},
        "own": {"structured_outputs": {"choice": ["at the top right", "nowhere"]}},
        "free": {"structured_outputs": None},
        "cut": {"max_tokens": 3},
        "bad-schema": {"structured_outputs": {"json": {"uniqueItems": True}}},
        "bad-regex": {"structured_outputs": {"regex": "(?=a)"}},
    }
    rows = [
        {"id": id, "images": [IMAGE], "prompt": QUESTION, "sampling": sampling}
        for id, sampling in samplings.items()
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(source: Path, out: Path, *options: str) -> int:
    media = ["--media-root", str(DEMO_IMAGES)]
    return main(["run", "--device", "cpu", "-i", str(source), "-o", str(out), *media, *options])


def test_rows_of_a_job(source: Path, schema: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    # Some rows are errors
    assert run(source, out, "--json-schema", str(schema)) == 3
    rows = rows_of(out)
    assert json.loads(rows["job"]["outputs"][0]["text"])["where"] in ("top right", "left")
    assert rows["own"]["outputs"][0]["text"] in ("at the top right", "nowhere")
    assert rows["free"]["outputs"][0]["text"] == "The star is at the top right."
    codes = {id: row["error"] and row["error"]["code"] for id, row in rows.items()}
    assert codes == {
        "job": None, "own": None, "free": None,
        "cut": "structured", "bad-schema": "sampling", "bad-regex": "sampling",
    }  # fmt: skip
    # The text is kept
    assert rows["cut"]["outputs"][0]["text"]
    assert rows["cut"]["outputs"][0]["finish_reason"] == "length"


def test_cut_answers_may_be_kept(source: Path, schema: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    options = ["--json-schema", str(schema), "--on-incomplete", "keep"]
    assert run(source, out, *options) == 3
    import pyarrow.parquet

    rows = {row["id"]: row for row in pyarrow.parquet.read_table(out).to_pylist()}
    assert rows["cut"]["error"] is None
    assert rows["cut"]["outputs"][0]["finish_reason"] == "length"


def test_plan_counts_refused_constraints(
    source: Path, schema: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-i", str(source), "--media-root", str(DEMO_IMAGES), "--json-schema", str(schema)]
    assert main(["plan", "--json", *options]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert "'uniqueItems' at # cannot be enforced" in json.dumps(plan)
    assert "look-around" in json.dumps(plan)
    # The row of 3 tokens
    assert plan["short_max_tokens"] == 1
    assert main(["plan", *options]) == 3
    assert "satisfies structured_outputs: 1" in capsys.readouterr().out
