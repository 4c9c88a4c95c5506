"""A step of the text model with a ``PagedCache`` as one CUDA graph.

A step of one token a row launches several hundred kernels. That takes the host longer than running
them takes the device, so the first steps of a cache are computed as usual, and the next one is
captured. A graph reads its inputs from fixed tensors, and it holds for one memory of the cache. When
the cache takes new memory, steps are computed as usual again, and a few later one is captured anew.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mistral import modeling_mistral

from idefics2_engine.hf import blocks
from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.hooks import is_recording, is_unhooked, record_as
from idefics2_engine.hf.operations import operations_of
from idefics2_engine.hf.packed_rows import count_left_padding
from idefics2_engine.hf.paged_cache import PagedCache, PagedLayer
from idefics2_engine.hf.paged_memory import Memory, Tables, make_tables

# A capture takes the time of two steps, which a short answer would not get back
_FIRST_STEPS = 4
# Modules of the text model whose forward passes launch kernels and do nothing else
_KNOWN = {
    blocks.MistralDecoderLayer,
    blocks.MistralAttention,
    blocks.MistralMLP,
    blocks.MistralRMSNorm,
    nn.Linear,
    type(ACT2FN["silu"]),
}


class MistralModel(modeling_mistral.MistralModel):  # type: ignore[no-untyped-call]
    """The text model, whose steps of one token a row are a graph if they may be."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Map tokens (B, Q) or ``inputs_embeds`` (B, Q, hidden) as transformers' ``forward``."""
        hidden = None
        if (
            isinstance(past_key_values, PagedCache)
            # Dynamo cannot trace what follows, and makes graphs of its own
            and not torch.compiler.is_compiling()
            and not _wants_more(self.config, kwargs)
        ):
            graph = past_key_values.graph
            if not isinstance(graph, DecodeGraph) or graph.model is not self:
                graph = past_key_values.graph = DecodeGraph(self, past_key_values)
            hidden = graph.run(input_ids, inputs_embeds, attention_mask, position_ids)
        if hidden is not None:
            return BaseModelOutputWithPast(
                last_hidden_state=hidden, past_key_values=past_key_values
            )
        transformers_own: Any = super().forward
        return transformers_own(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


record_as(MistralModel, modeling_mistral.MistralModel)


def _wants_more(config: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a forward is asked for more than the last hidden states."""
    return (
        is_recording()
        or config.output_attentions
        or config.output_hidden_states
        or any(value for name, value in kwargs.items() if name.startswith("output_"))
    )


class _Inputs(NamedTuple):
    """The fixed tensors that a graph reads."""

    # (B, 1, hidden)
    hidden: Tensor
    table: blocks.RotaryTable
    tables: Tables


class _Captured(NamedTuple):
    replay: Callable[[], None]
    inputs: _Inputs
    # (B, 1, hidden)
    output: Tensor
    memories: list[Memory | None]
    # Of all parameters; other addresses need another graph
    addresses: list[int]


class DecodeGraph:
    """The steps of one model with one cache.

    Args:
        model: The text model.
        cache: Its cache.
    """

    def __init__(self, model: MistralModel, cache: PagedCache) -> None:
        self.model = model
        self._cache = cache
        self._captured: _Captured | None = None
        self._memories: list[Memory | None] = []
        self._num_steps = 0
        self._modules: list[nn.Module] = [*list(model.layers.modules())[1:], model.norm]
        known = _KNOWN.union(blocks.nf4_layers().values())
        self._is_known = all(type(module) in known for module in self._modules)

    def run(
        self,
        input_ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor | None:
        """Compute a step; return the last hidden states (B, 1, hidden).

        Returns ``None``, and changes nothing, where transformers' ``forward`` must run.
        """
        first = input_ids if embeds is None else embeds
        if first is None or position_ids is None or not self._can_run(first):
            return None
        x = self.model.embed_tokens(input_ids) if embeds is None else embeds
        ops = operations_of(self.model).for_call(x, module=self.model)
        if ops is None or not self._may_capture():
            return None
        # It waits for the device, so steps that are computed as usual do not ask for it twice
        padding = self._padding(attention_mask, len(x))
        if padding is None:
            return None
        ((begin, end),) = {layer.append_slot() for layer in self._layers}
        memory = self._memories[0]
        assert memory is not None
        inputs = _Inputs(
            x,
            self.model.rotary_emb(x, position_ids=position_ids),
            make_tables(memory, padding, begin, end, 1),
        )
        if self._captured is None or not self._fits(self._captured, inputs):
            self._captured = self._capture(inputs)
        else:
            for fixed, new in zip(_tensors(self._captured.inputs), _tensors(inputs), strict=True):
                fixed.copy_(new)
        self._captured.replay()
        return self._captured.output.clone()

    @property
    def _layers(self) -> list[PagedLayer]:
        # transformers types them as layers of any cache
        return cast(list[PagedLayer], self._cache.layers)

    def _can_run(self, first: Tensor) -> bool:
        """Return whether a step with ``first`` (B, Q, ...) is one that a graph may compute."""
        return (
            first.shape[1] == 1
            and has_graphs(first.device)
            and self._is_known
            and not torch.is_grad_enabled()
            and not self.model.training
            and self.model.config._attn_implementation == NAME
            and all(map(is_unhooked, self._modules))
        )

    def _padding(self, attention_mask: Tensor | None, B: int) -> Tensor | None:
        """Return the padding (B,) before the tokens that the cache shows, if there is no other."""
        (num_seen,) = {layer.num_seen for layer in self._layers}
        length = num_seen + 1
        if attention_mask is None:
            device = self.model.norm.weight.device
            return torch.zeros(B, dtype=torch.int64, device=device)
        if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
            return None
        return count_left_padding(attention_mask[:, -length:], 1)

    def _may_capture(self) -> bool:
        """Return whether the cache's memory has been the same for a few steps, and has room."""
        memories = [layer.memory_with_room for layer in self._layers]
        if _are_same(memories, self._memories):
            self._num_steps += 1
        else:
            # The graph would keep the memory that the cache has left
            self._num_steps, self._captured = 0, None
        self._memories = memories
        return None not in memories and self._num_steps >= _FIRST_STEPS

    def _fits(self, captured: _Captured, inputs: _Inputs) -> bool:
        """Return whether a graph reads the memory of the cache and the parameters of now."""
        shapes = [tensor.shape for tensor in _tensors(inputs)]
        return (
            _are_same(captured.memories, self._memories)
            and captured.addresses == self._addresses()
            and shapes == [tensor.shape for tensor in _tensors(captured.inputs)]
        )

    def _capture(self, inputs: _Inputs) -> _Captured:
        fixed = _Inputs(
            inputs.hidden.clone(),
            blocks.RotaryTable(*(tensor.clone() for tensor in inputs.table)),
            Tables(*(tensor.clone() for tensor in inputs.tables)),
        )

        def step() -> Tensor:
            hidden = fixed.hidden
            with self._cache.fixed(fixed.tables):
                for layer in self.model.layers:
                    hidden = layer(
                        hidden,
                        past_key_values=self._cache,
                        use_cache=True,
                        position_embeddings=fixed.table,
                    )
            normed: Tensor = self.model.norm(hidden)
            return normed

        replay, output = capture(step)
        return _Captured(replay, fixed, output, self._memories, self._addresses())

    def _addresses(self) -> list[int]:
        return [
            one.data_ptr()
            for module in self._modules
            for one in module._parameters.values()
            if one is not None
        ]


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture ``step``, which launches kernels on fixed tensors, and may be run several times.

    Returns:
        A function that runs the kernels, and the tensor that they write.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Libraries prepare themselves for the stream
        step()
        # Other threads may allocate meanwhile
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            output = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, output


def _are_same(some: list[Memory | None], others: list[Memory | None]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def has_graphs(device: torch.device) -> bool:
    """Return whether steps on ``device`` may be graphs."""
    return device.type == "cuda"


def _tensors(inputs: _Inputs) -> list[Tensor]:
    return [inputs.hidden, *inputs.table, *inputs.tables]
