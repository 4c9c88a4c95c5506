"""The scripts in ``examples/`` and the code in ``docs/`` run as described."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from paths import ROOT

EXAMPLES = ROOT / "examples"
SHAPES = EXAMPLES / "images/shapes.png"
STAR = "Where is the star?"


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    script = str(EXAMPLES / name)
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")


def snippets(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )


def ask(model: str | Path, question: str) -> str:
    content = [{"type": "image", "image": SHAPES}, {"type": "text", "text": question}]
    with LLM(model) as llm:
        conversation = [{"role": "user", "content": content}]
        (output,) = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=32))
    return output.outputs[0].text


def test_batch_jsonl_writes_an_answer_or_error_for_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        json.dumps({"id": "star", "images": [str(SHAPES)], "question": STAR}),
        json.dumps({"id": "gone", "images": [str(tmp_path / "no.png")], "question": STAR}),
        "not JSON",
        json.dumps({"id": "bare"}),
        json.dumps({"id": 5, "images": [], "question": "Hello."}),
        json.dumps({"image": str(SHAPES), "question": STAR}),
        json.dumps([STAR]),
        json.dumps({"id": "path", "images": str(SHAPES), "question": STAR}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match=r"^6 lines of .*out\.jsonl have an error"):
        run_script(monkeypatch, "batch_jsonl.py", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_id = {answer.pop("id"): answer for answer in answers}
    assert len(answers) == len(lines)
    assert by_id["star"] == {"text": "The star is at the top right.", "finish_reason": "stop"}
    assert by_id["gone"]["error"]["code"] == "image"
    assert by_id[5]["text"]
    for name, message in {
        "line 3": "must be JSON: Expecting value: line 1 column 1 (char 0)",
        "bare": "must have the keys id, images, question, got no images, no question",
        "line 6": "must have the keys id, images, question, got no id, no images",
        "line 7": "must be a JSON object, got list",
        "path": "images must be a list, got str",
    }.items():
        assert by_id[name]["error"] == {"code": "prompt", "message": message}


def test_all_weights_learn_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(monkeypatch, "finetune/all_weights.py", tmp_path / "tuned")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.01 < 1 < losses[0]
    assert ask(tmp_path / "tuned", STAR) == "At the top right."


def test_one_kernel_is_near_float64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(monkeypatch, "one_kernel.py")
    printed = capsys.readouterr().out
    assert printed.startswith("(203, 4, 128) on ")
    assert 0 < float(printed.split()[-1]) < 1e-5


def test_receipts_become_objects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "receipts.py", "--device", "cpu", "--count", 2)
    assert ended.value.code == 0
    assert "2 of 2 answers are receipts" in capsys.readouterr().out


def test_training_lines_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = [code for code in snippets("docs/training.md") if "forward_padded" in code]
    code = code.replace('"tuned"', repr(str(tmp_path / "tuned")))
    names: dict[str, Any] = {}
    exec(code, names)
    assert 0 < names["loss"].item() < 20
    assert ask(tmp_path / "tuned", "What color is the heart?") != ""


def test_jsonl_loop_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for code in snippets("docs/offline.md") if "jsonl" in code]
    assert sum(map(bool, code.splitlines())) <= 12
    monkeypatch.chdir(tmp_path)
    rows = [{"image": str(SHAPES), "question": STAR}, {"image": "no.png", "question": STAR}]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(code, {})
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    good, bad = sorted(answers, key=lambda answer: int(answer["request_id"]))
    assert good["outputs"][0]["text"] == "The star is at the top right."
    assert bad["error"]["code"] == "image"
