"""The warm-up does not depend on settings of the caller."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics2_engine import LLM
from idefics2_engine.runtime.warm_up import warm_up_model, warm_up_sampling
from idefics2_kernels import REFERENCE


def test_callers_default_dtype_does_not_matter(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cpu", max_model_len=64, kv_cache_tokens=64)
    drawn = []

    def sample(logits: Tensor, temperature: Tensor, *rest: Any, **options: Any) -> Tensor:
        # The kernel rejects parameters in another dtype
        assert temperature.dtype == torch.float32
        drawn.append(logits.dtype)
        return REFERENCE.sample(logits, temperature, *rest, **options)

    llm.model.ops = replace(REFERENCE, sample=sample)
    torch.set_default_dtype(torch.float64)
    try:
        warm_up_model(llm.model, llm.engine.runner.kv_cache)
        warm_up_sampling(llm.model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(drawn) == {torch.float32}
