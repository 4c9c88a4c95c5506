"""A CUDA device against the CPU: the reference's logits, and the demo model's answers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo_questions import first_questions
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.device import Uploader
from idefics2_engine.errors import ConfigError
from idefics2_engine.model.batch import TextBatch
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.runtime.memory_profile import bytes_per_token, kv_cache_tokens
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


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
def test_upload(source: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics2_engine.device._BUFFER_BYTES", 64)
    uploader = Uploader(torch.device("cuda"))
    # The shapes go around the ring of buffers many times
    for shape in (7, 1), (3, 5, 33), (0, 4), (32,), ():
        weight = torch.randn(shape).to(source)
        there = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        assert uploader.copy(weight, there) is there
        assert torch.equal(there.cpu(), weight.to(torch.bfloat16))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_demo_gives_the_same_tokens_as_on_the_cpu(quantization: str | None) -> None:
    chats = first_questions()
    params = SamplingParams(temperature=0.0, max_tokens=64)

    def answers(device: str, dtype: str) -> list[RequestOutput]:
        llm = LLM(device=device, dtype=dtype, quantization=quantization, kv_cache_tokens=8192)
        return llm.chat(chats, params)

    tokens = [
        [output.outputs[0].token_ids for output in answers(device, "float32")]
        for device in ("cpu", "cuda")
    ]
    assert tokens[0] == tokens[1]
    wide = answers("cuda", "auto")
    assert all(output.outputs[0].finish_reason == "stop" for output in wide)


def test_cache_uses_the_remaining_memory() -> None:
    llm = LLM(device="cuda", kv_cache_tokens=8192, max_num_seqs=10**6)
    free, total = torch.cuda.mem_get_info()
    share = (total - free + 8 * 2**30) / total
    tokens = kv_cache_tokens(llm.model, llm.engine_config, share)
    taken = tokens * bytes_per_token(llm.config.text, llm.model.dtype)
    assert 2**30 < taken <= 8 * 2**30
    few = kv_cache_tokens(llm.model, replace(llm.engine_config, max_num_seqs=2), share)
    pages = llm.engine_config.max_model_len / llm.engine_config.page_size
    assert few == 2 * math.ceil(pages) * llm.engine_config.page_size
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        kv_cache_tokens(llm.model, llm.engine_config, (total - free) / total)
