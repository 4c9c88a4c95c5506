"""The text model's steps as CUDA graphs.

A step in which every sequence decodes has a graph for each of a few batch sizes. Any other step has
a graph for each of a few numbers of tokens: its chunks and decoding sequences may be divided among
the tokens in any way, because attention finds its tiles on the device.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from idefics2_engine.device import packed_length, to_device
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.cuda_graphs import GraphPool, next_size, sizes_up_to
from idefics2_engine.runtime.input_batch import (
    NOTHING,
    SAMPLED,
    PackedStep,
    StepShape,
    padded,
    resolve_pending_tokens,
    text_batch,
)
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_engine.runtime.shared_prefix_tables import SharedPrefixTables

MAX_SEQUENCES = 512
"""Most sequences of a graph."""
MAX_TOKENS = 8192
"""Most tokens of a graph. For larger steps, launches take the host less time than the device."""
# The time of a decode step is mostly that of reading the weights, whatever the number of rows
_DECODE_STEPS = [(1, 1), (2, 1), (4, 2), (64, 8), (MAX_SEQUENCES, 16)]
# Half of a step is padded on average
_TOKEN_STEPS = [(1024, 64), (2048, 128), (4096, 256), (MAX_TOKENS, 512)]


class TextGraphs:
    """CUDA graphs of one model and one KV cache, all captured on construction.

    Args:
        model: Model on a CUDA device.
        kv_cache: KV cache that the graphs read and write.
        image_features: (entries, latents, hidden) encoder cache that the graphs read.
        last_tokens: (sequences,) int32, tokens of the previous step, to which inputs may refer.
        max_pages: Most pages of a sequence.
        max_tokens: Most tokens of a step with prompts. 0 captures decode steps alone.
        pool: Captures the graphs.
        shared_prefixes: Says which decode steps have a table of shared prefixes. ``None`` if none.
    """

    def __init__(
        self,
        model: Idefics2,
        kv_cache: KVCache,
        image_features: Tensor,
        last_tokens: Tensor,
        max_pages: int,
        max_tokens: int,
        pool: GraphPool,
        shared_prefixes: SharedPrefixTables | None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.image_features = image_features
        self.last_tokens = last_tokens
        sequences = min(len(last_tokens), MAX_SEQUENCES)
        self.decode_sizes = decode_sizes(sequences)
        self.token_sizes = token_sizes(max_tokens) if max_tokens else []
        # Decode steps apart, whose time hardly depends on padding
        self.num_padded_tokens = 0
        shapes = [
            StepShape(tokens, sequences, max_pages, min(sequences, tokens), has_images=True)
            for tokens in self.token_sizes
        ]
        shapes += [
            StepShape(
                size,
                size,
                max_pages,
                has_shared=shared_prefixes is not None and shared_prefixes.can_share(size),
            )
            for size in self.decode_sizes
        ]
        self._shapes = {(shape.tokens, shape.has_images): shape for shape in shapes}
        text = model.config.text

        def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((rows, columns), device=model.device, dtype=dtype)

        length = max(packed_length(padded(NOTHING, shape).arrays()) for shape in shapes)
        self._inputs = empty(1, length, torch.int32)[0]
        self._logits = empty(self.decode_sizes[-1], text.padded_vocab_size, model.dtype)
        most = max(self.token_sizes, default=0)
        self.hidden = empty(most, text.hidden_size, model.dtype)
        """(tokens, hidden) of the last step that was not a decode step."""
        largest = self.decode_sizes[-1]
        # The largest graph is captured first, and the others reuse its memory
        self._captured = {
            (shape.tokens, shape.has_images): pool.capture(
                self._forward(shape),
                warm_up=shape.tokens in (most, largest),
            )
            for shape in sorted(shapes, key=lambda shape: -shape.tokens)
        }

    def can_run(self, packed: PackedStep) -> bool:
        """Return whether ``packed`` fits a graph."""
        sizes = self.decode_sizes if packed.is_decode else self.token_sizes
        return len(packed.context_lens) <= self.decode_sizes[-1] and len(packed.input_ids) <= max(
            sizes, default=0
        )

    def shape(self, packed: PackedStep) -> StepShape:
        """Return the shape to which a step that ``can_run`` is padded."""
        sizes = self.decode_sizes if packed.is_decode else self.token_sizes
        return self._shapes[next_size(sizes, len(packed.input_ids)), not packed.is_decode]

    def run(self, packed: PackedStep) -> Tensor:
        """Replay the graph of a step that ``can_run``.

        Returns:
            Logits (rows, vocabulary) of the tokens that sample, which the next step overwrites.
        """
        shape = self.shape(packed)
        if not packed.is_decode:
            self.num_padded_tokens += shape.tokens - len(packed.input_ids)
        to_device(padded(packed, shape).arrays(), self.model.device, self._inputs)
        self._captured[shape.tokens, shape.has_images].replay()
        return self._logits[: len(packed.sampled), : self.model.config.text.vocab_size]

    def _forward(self, shape: StepShape) -> Callable[[], None]:
        """Return the forward pass of steps of ``shape``."""
        model = self.model
        step = padded(NOTHING, shape)
        if shape.has_images:
            step = replace(step, max_seqlen=shape.tokens)
        copies = to_device(step.arrays(), model.device, self._inputs)
        features = self.image_features if shape.has_images else None

        def forward() -> None:
            input_ids = resolve_pending_tokens(copies[0], self.last_tokens)
            batch = text_batch(copies, input_ids, step)
            hidden = model.hidden_states(batch, features, self.kv_cache.layers)
            if shape.has_images:
                self.hidden[: shape.tokens] = hidden
                hidden = hidden[copies[SAMPLED]]
            logits = model.logits(hidden)
            self._logits[: len(logits), : logits.shape[1]] = logits

        return forward


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of decoding sequences to capture, up to ``MAX_SEQUENCES``."""
    return sizes_up_to(min(max_num_seqs, MAX_SEQUENCES), _DECODE_STEPS)


def token_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens to capture, up to ``MAX_TOKENS``."""
    return sizes_up_to(min(max_tokens, MAX_TOKENS), _TOKEN_STEPS)
