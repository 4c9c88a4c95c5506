"""The memory that ``generate`` takes beside weights and KV cache, at its peak."""

import gc
from typing import Any

import torch

from idefics2_bench.hf.answers import ENGINE, LOOP, own_answer, peer_answer
from idefics2_bench.hf.cases import Texts
from idefics2_bench.hf.models import Models
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.runtime.memory_profile import bytes_per_token

Row = dict[str, Any]


def memory_obstacle(models: Models) -> str | None:
    """Return why this case cannot run, or ``None`` if it can."""
    return None if models.device.type == "cuda" else "only a GPU's allocations are counted"


def memory_rows(models: Models, texts: Texts) -> list[Row]:
    """Measure the first call of each way to generate, which makes what it needs."""
    answers = {
        ENGINE: own_answer(ENGINE, models, texts),
        LOOP: own_answer(LOOP, models, texts),
        PEER: peer_answer(models, texts),
    }
    rows: list[Row] = []
    for name, answer in answers.items():
        models.own.engine.close()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(models.device)
        before = torch.cuda.memory_allocated(models.device)
        answer()
        peak = torch.cuda.max_memory_allocated(models.device)
        rows.append({"impl": name, **memory_figures(name, models, texts, before, peak)})
    models.own.engine.close()
    return rows


def memory_figures(impl: str, models: Models, texts: Texts, before: int, peak: int) -> Row:
    """Return the figures of a call that had ``before`` bytes at its start and ``peak`` at most.

    The KV cache of the engine is as large as its config says, and elsewhere that of all tokens.
    """
    packed, engine = models.packed, models.own.engine.engine
    tokens = texts.count * (texts.length + texts.new_tokens)
    if impl == ENGINE and engine is not None:
        tokens = engine.config.kv_cache_tokens
    cache = tokens * bytes_per_token(packed.config.text, packed.dtype)
    weights = packed.num_bytes
    return {
        "beside_GB": (peak - weights - cache) / 1e9,
        "before_GB": (before - weights) / 1e9,
        "peak_GB": peak / 1e9,
        "kv_cache_GB": cache / 1e9,
        "weights_GB": weights / 1e9,
    }
