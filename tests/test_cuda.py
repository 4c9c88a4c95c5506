"""A CUDA device against the CPU: the reference path's logits, and what the demo model says."""

import json
from pathlib import Path

import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.batch import TextBatch
from idefics2_engine.checkpoint import load_checkpoint, save_checkpoint
from idefics2_engine.config import ModelConfig
from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.model import Idefics2
from oracle import CASES, image_batch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits(case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = case.config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = Idefics2(ModelConfig.from_dict(config))
    start.init_weights(std=0.1)
    save_checkpoint(start, tmp_path)
    logits = {}
    for device, dtype in (
        ("cpu", torch.float64),
        ("cpu", torch.float32),
        ("cuda", torch.float32),
        ("cpu", torch.bfloat16),
        ("cuda", torch.bfloat16),
    ):
        model = load_checkpoint(tmp_path, device=device, dtype=dtype)
        images = image_batch(case.make_tiles())
        batch = TextBatch.from_ids(case.token_ids()).to(device)
        with torch.no_grad():
            features = None if images is None else model.image_features(images.to(device))
            logits[device, dtype] = model(batch, features).cpu().double()
    exact = logits["cpu", torch.float64]
    scale = exact.abs().amax(-1)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (
            (logits[device, dtype] - exact).abs().amax(-1) for device in ("cuda", "cpu")
        )
        assert (ours <= 2 * (theirs + torch.finfo(dtype).eps * scale)).all(), dtype


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_demo_answers_as_on_the_cpu(quantization: str | None) -> None:
    questions = json.loads((DEMO_IMAGES / "questions.json").read_text())
    chats = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": str(DEMO_IMAGES / i)} for i in q["images"]),
                    {"type": "text", "text": q["turns"][0][0]},
                ],
            }
        ]
        for q in questions
    ]
    params = SamplingParams(temperature=0.0, max_tokens=64)
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(device=device, dtype="float32", quantization=quantization).chat(
                chats, params
            )
        ]
        for device in ("cpu", "cuda")
    ]
    assert answers[0] == answers[1]
    wide = LLM(device="cuda", quantization=quantization).chat(chats, params)
    assert all(output.outputs[0].finish_reason == "stop" for output in wide)
