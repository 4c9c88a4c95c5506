"""``examples/finetune/qlora.py``: it learns, resumes, and its adapter answers in ``LLM``."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

from hf_models import needs_processor
from idefics2_engine import LLM
from paths import ROOT

SCRIPT = str(ROOT / "examples/finetune/qlora.py")

pytestmark = [
    needs_processor,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_learns_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path)
    shares = re.search(r"accuracy: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert shares is not None
    before, after = map(float, shares.groups())
    assert before <= 0.05
    assert after >= 0.85
    # The engine merges the adapter into weights that were not quantized
    part = runpy.run_path(SCRIPT)["Parts"](2_000_000, 1)[0]
    content = [
        {"type": "image", "image": part["image"]},
        {"type": "text", "text": part["question"]},
    ]
    with LLM(adapter=tmp_path, dtype="float32", split_images=False) as llm:
        (output,) = llm.chat([{"role": "user", "content": content}])
    assert output.outputs[0].text in ("on the left.", "on the right.")
    # The last third of the steps is the same after an interruption
    adapter = tmp_path / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.unlink()
    shutil.rmtree(tmp_path / "checkpoint-60")
    run(monkeypatch, tmp_path, "--resume", "--held-out", 1)
    assert adapter.read_bytes() == whole
