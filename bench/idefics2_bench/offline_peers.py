"""transformers' side of ``idefics2 bench offline``: batches in ``generate``, or compiled decoding.

Prompts are padded on the left, and each batch runs as long as its longest answer. Processing is the
engine's, whose pixels are equal; its time is included.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idefics2_bench import transformers_peer
from idefics2_bench.latency_peers import (
    COMPILED_PEER,
    MaskedStep,
    cuda_graph_skips,
    no_grad,
    static_cache,
)
from idefics2_bench.offline_workloads import OfflineRequest
from idefics2_bench.timing import synchronize
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor

Generate = Callable[[dict[str, Tensor], int], Tensor]
"""Continues padded inputs by a number of tokens (B, tokens)."""

RUNS = {
    "arrival": f"{PEER}-arrival",
    "sorted": f"{PEER}-sorted",
    "compiled": f"{COMPILED_PEER}-sorted",
}
"""The peer's runs and their names in rows: the order of requests, and compiled decoding."""

# The first step compiles, and the next ones warm up and capture the graph
_WARM_UP_TOKENS = 5


@dataclass(frozen=True)
class Batches:
    """Requests in batches of ``size``.

    Attributes:
        processor: Prepares prompts.
        requests: The requests, in order.
        size: Requests of a batch.
        is_filled: Whether the last batch is filled up with its last request.
    """

    processor: Processor
    requests: Sequence[OfflineRequest]
    size: int
    is_filled: bool = False

    def __iter__(self) -> Iterator[Sequence[OfflineRequest]]:
        """Return the batches."""
        for first in range(0, len(self.requests), self.size):
            batch = list(self.requests[first : first + self.size])
            yield batch + batch[-1:] * (self.size - len(batch)) * self.is_filled

    @property
    def num_tokens(self) -> int:
        """Most tokens of a sequence, with the padding before it."""
        return max(
            max(len(one.prompt_token_ids) for one in batch) + max(one.max_tokens for one in batch)
            for batch in self
        )


class EagerGeneration:
    """transformers' ``generate``."""

    def __init__(self, peer: Any, pad_id: int) -> None:
        self.peer = peer
        self.pad_id = pad_id

    def __call__(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Continue ``inputs``."""
        return transformers_peer.generate(self.peer, inputs, self.pad_id, max_new_tokens)


class CompiledGeneration:
    """A loop over prompts that are computed eagerly and decode steps that are compiled.

    All batches use one static cache, so they must have one size.

    Args:
        peer: transformers' model.
        num_tokens: Tokens of the longest sequence, with the padding before it.
    """

    def __init__(self, peer: Any, num_tokens: int) -> None:
        self.peer = peer
        self.cache = static_cache(peer, num_tokens)
        self.step = MaskedStep(peer, self.cache, peer.config.text_config.sliding_window)

    def __call__(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Continue ``inputs``."""
        with no_grad():
            mask = inputs["attention_mask"]
            length = mask.shape[1]
            self.cache.reset()
            output = self.peer(
                **inputs,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            padding = length - mask.sum(-1, keepdim=True)
            place = torch.full((1, 1), length, device=mask.device)
            drawn = [tokens]
            for _ in range(max_new_tokens - 1):
                tokens = self.step(tokens, place, padding).argmax(-1, keepdim=True)
                place += 1
                drawn.append(tokens)
            return torch.cat(drawn, 1)


def compiled_generation(
    peer: Any, batches: Batches, warm_up: Sequence[OfflineRequest]
) -> tuple[CompiledGeneration, dict[str, float]]:
    """Compile for ``batches``.

    Returns:
        What generates, and facts for the row: the seconds that this took, and how often a graph
        was not captured as a CUDA graph.
    """
    torch.compiler.reset()
    first = Batches(batches.processor, warm_up[: batches.size], batches.size, is_filled=True)
    most = max(batches.num_tokens, first.num_tokens + _WARM_UP_TOKENS)
    generate = CompiledGeneration(peer, most)
    begin, skips = time.perf_counter(), cuda_graph_skips()
    (batch,) = first
    generate(_inputs(peer, batches.processor, _prompts(batches.processor, batch)), _WARM_UP_TOKENS)
    synchronize(peer.device)
    return generate, {
        "compile_seconds": time.perf_counter() - begin,
        "cuda_graph_skips": cuda_graph_skips() - skips,
    }


def run_batches(peer: Any, generate: Generate, batches: Batches) -> float:
    """Generate all ``batches``; return the seconds that reading their images took."""
    reading = 0.0
    for batch in batches:
        begin = time.perf_counter()
        prompts = _prompts(batches.processor, batch)
        reading += time.perf_counter() - begin
        longest = max(request.max_tokens for request in batch)
        tokens = generate(_inputs(peer, batches.processor, prompts), longest).tolist()
        if len(tokens) != len(batch):
            raise RuntimeError(f"transformers answered {len(tokens)} of {len(batch)} requests")
    return reading


def _prompts(processor: Processor, batch: Sequence[OfflineRequest]) -> list[ProcessedPrompt]:
    return processor.finish(
        [processor.draft_token_prompt(one.prompt_token_ids, one.images) for one in batch]
    )


def _inputs(peer: Any, processor: Processor, prompts: list[ProcessedPrompt]) -> dict[str, Tensor]:
    pad_id = processor.tokenizer.pad_id or 0
    return transformers_peer.generation_inputs(peer, prompts, processor.image_config, pad_id)
