"""The ways to answer prompts that are compared: ``generate`` of both classes, and ``LLM``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import idefics2_engine.llm
from idefics2_bench.hf.cases import Texts
from idefics2_bench.hf.models import Models
from idefics2_bench.transformers_peer import decoding_without_cudnn
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.runtime.config import PAGE_SIZE

Answer = Callable[[], Tensor]
"""Answers all prompts and returns the new tokens (B, N)."""

ENGINE, LOOP, OF_LLM = "engine", "loop", "llm"
_BACKENDS = {ENGINE: "engine", LOOP: "transformers"}


def own_answer(impl: str, models: Models, texts: Texts) -> Answer:
    """Return ``generate`` of our class on the engine or in transformers' loop."""
    ids = models.prompts(texts)

    def answer() -> Tensor:
        models.own.generation_backend = _BACKENDS[impl]
        return _generated(models.own, ids, texts)

    return answer


def peer_answer(models: Models, texts: Texts, **arguments: Any) -> Answer:
    """Return ``generate`` of transformers' class with more ``arguments``.

    Its decode steps run without cuDNN's attention, as in ``bench latency``.
    """
    ids = models.prompts(texts)

    def answer() -> Tensor:
        with decoding_without_cudnn() as processors:
            return _generated(models.peer, ids, texts, logits_processor=processors, **arguments)

    return answer


def _generated(model: Any, ids: Tensor, texts: Texts, **arguments: Any) -> Tensor:
    tokens: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=texts.new_tokens,
        **arguments,
    )
    new = tokens[:, texts.length :]
    if new.shape[1] != texts.new_tokens:
        raise RuntimeError(f"generate must give {texts.new_tokens} tokens, got {new.shape[1]}")
    return new


@contextmanager
def llm_answer(models: Models, texts: Texts) -> Iterator[Answer]:
    """Yield ``LLM.generate`` on the same weights, and close the ``LLM`` at the end."""
    length = texts.length + texts.new_tokens
    # The scheduler keeps a page free for each running sequence
    pages = -(-length // PAGE_SIZE) + 1
    with patch.object(idefics2_engine.llm, "load_model", lambda *_: models.packed):
        llm = LLM(
            models.folder,
            load_format="dummy",
            device=str(models.device),
            dtype=str(models.packed.dtype).removeprefix("torch."),
            ops=models.packed.ops,
            max_model_len=length,
            max_num_seqs=texts.count,
            kv_cache_tokens=texts.count * pages * PAGE_SIZE,
            image_workers=0,
            enable_prefix_caching=False,
        )
    prompts = [{"prompt_token_ids": ids} for ids in models.prompts(texts).tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=texts.new_tokens, ignore_eos=True)

    def answer() -> Tensor:
        outputs = llm.generate(prompts, params)
        tokens = [output.outputs[0].token_ids for output in outputs]
        return torch.tensor(tokens, device=models.device)

    try:
        yield answer
    finally:
        llm.close()
