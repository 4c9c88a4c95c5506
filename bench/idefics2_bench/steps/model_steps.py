"""Steps of the model on the device: decode and prefill through a KV cache, and images.

A step is what the engine captures as a CUDA graph, and the choice of the likeliest token. It has no
scheduling, no copies from and to the host, and no padding. Keys and values are random, so that a long
context needs no prefill.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from idefics2_bench.workloads import tiles
from idefics2_engine.jobs.plan.latency_case import LatencyCase
from idefics2_engine.model.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.runtime.kv_cache import KVCache

ModelStep = Callable[[], Tensor]
"""Runs a step on fixed tensors, and returns a result that is finite if all is well."""


def model_step(case: LatencyCase, model: Idefics2) -> ModelStep:
    """Return the step of ``case``."""
    if case.kernel == "image":
        vision = model.config.vision
        images = ImageBatch.from_tiles(tiles(case, vision.patch_size, vision.grid)).to(model.device)
        return lambda: model.image_features(images)
    # A decode step has one token a sequence, after a prompt of ``case.length``
    tokens, context = (1, case.length + 1) if case.kernel == "step" else (case.length, case.length)
    return _text_step(model, case.batch, tokens, context)


def _text_step(model: Idefics2, sequences: int, tokens: int, context: int) -> ModelStep:
    """Return a step of the last ``tokens`` of sequences that have ``context`` tokens each."""
    text, generator = model.config.text, torch.Generator().manual_seed(0)
    width = -(-context // PAGE_SIZE)
    cache = KVCache(text, sequences * width, PAGE_SIZE, model.device, model.dtype)
    for layer in cache.layers:
        for tensor in layer:
            tensor.normal_()
    pages = torch.randperm(sequences * width, generator=generator, dtype=torch.int32)
    table = pages.view(sequences, width)
    positions = torch.arange(context - tokens, context, dtype=torch.int32)
    slots = table[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    total = sequences * tokens
    last = torch.arange(tokens - 1, total, tokens, dtype=torch.int32)
    batch = TextBatch(
        input_ids=torch.randint(text.vocab_size, (total,), generator=generator, dtype=torch.int32),
        positions=positions.repeat(sequences),
        cu_seqlens=cumulative([tokens] * sequences),
        max_seqlen=tokens,
        logits_indices=None if tokens == 1 else last,
        paged=PagedView(
            slots=slots.flatten().int(),
            block_table=table,
            context_lens=torch.full((sequences,), context, dtype=torch.int32),
        ),
    ).to(model.device)

    def step() -> Tensor:
        logits: Tensor = model(batch, None, cache.layers)
        largest, _tokens = logits.max(-1)
        return largest

    return step
