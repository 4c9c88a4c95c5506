"""A cache for transformers' generate loop, in memory that ``paged_attention`` reads.

``Idefics2ForConditionalGeneration`` here is transformers' class, whose ``generate`` makes one. The
text model's attention (``blocks``) begins a step of each layer, writes its keys and values and
attends to its pages. All other operations, transformers' own among them, call ``update``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.paged_memory import PAGE, LastTables, Memory, Step, Tables


class PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of a layer that sees all tokens.

    ``keys`` and ``values`` are slices of the memory. If another method made other tensors of them,
    or no slot is free behind them, the next tokens are written to new memory.

    Args:
        tables: What the layers of a cache share.
        max_length: Tokens beyond which no room is made ahead. ``None`` if not known.
        **kwargs: transformers' arguments.
    """

    def __init__(self, tables: LastTables, max_length: int | None, **kwargs: Any) -> None:
        init: Any = super().__init__
        init(**kwargs)
        self._last = tables
        self._max_length = max_length
        self.memory: Memory | None = None

    @property
    def reach(self) -> int | None:
        """The most tokens before a query that it sees."""
        return None

    @property
    def kept(self) -> int | None:
        """The most tokens that are kept for later queries."""
        return None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without tokens, with rows and heads as in ``key_states`` (B, H_KV, Q, D)."""
        super().lazy_initialization(key_states, value_states)
        B, H_KV, _, D = key_states.shape
        self.keys = key_states.new_empty(B, H_KV, 0, D)
        self.values = value_states.new_empty(B, H_KV, 0, D)
        self.memory = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H_KV, Q, D), and return all that their queries see.

        Raises:
            ValueError: The new ones need gradients, or differ from the cache in rows or heads.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "past_key_values must be transformers' DynamicCache where gradients are needed, "
                "got a PagedCache"
            )
        if torch.compiler.is_compiling():
            # Places in memory cannot be traced
            states: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        (B, H_KV, Q, D), held = key_states.shape, self.keys.shape
        if held != (B, H_KV, held[2], D):
            raise ValueError(
                f"past_key_values must have the shape (B, H_KV, S, D) of the new keys "
                f"{(B, H_KV, held[2], D)}, got {tuple(held)}"
            )
        memory, begin, end = self._append(Q)
        # Of a long prompt not all need to be stored
        stored = min(Q, end)
        memory.keys[:, :, end - stored : end] = key_states[:, :, Q - stored :]
        memory.values[:, :, end - stored : end] = value_states[:, :, Q - stored :]
        if held[2] == 0:
            return key_states, value_states
        return memory.keys[:, :, begin:end], memory.values[:, :, begin:end]

    def begin_step(self, key_states: Tensor, mask: Tensor | None) -> Step | None:
        """Add slots for new keys (B, Q, H_KV, D), which the caller writes, and return the places.

        Returns ``None``, and adds none, where ``update`` and transformers' attention must run: for
        the first tokens, and if ``mask`` hides more than padding on the left and what follows.
        """
        keys = self.keys
        B, Q, H_KV, D = key_states.shape
        if keys is None or keys.shape != (B, H_KV, keys.shape[2], D) or not keys.shape[2]:
            return None
        if keys.dtype != key_states.dtype or not self._last.accepts(mask):
            return None
        memory, begin, end = self._append(Q)
        return Step(memory, self._last.get(memory, begin, end, Q))

    @property
    def memory_with_room(self) -> Memory | None:
        """The memory of all tokens, if it has a slot for one more."""
        memory, keys = self.memory, self.keys
        if memory is None or keys is None:
            return None
        end = memory.end_of(keys)
        return memory if end is not None and end < memory.capacity else None

    @property
    def num_seen(self) -> int:
        """Tokens before the next one that it sees."""
        past = 0 if self.keys is None else self.keys.shape[2]
        return past if self.reach is None else min(past, self.reach)

    def append_slot(self) -> tuple[int, int]:
        """Add a slot, which the caller writes; return the first that it sees, and the next free."""
        _, begin, end = self._append(1)
        return begin, end

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows for beam search, with the free slots behind them."""
        memory, keys = self.memory, self.keys
        if memory is None or keys is None or memory.end_of(keys) is None:
            super().reorder_cache(beam_idx)
            return
        rows = beam_idx.to(keys.device)
        self.memory = Memory.allocate(keys, len(rows), memory.capacity)
        torch.index_select(memory.keys, 0, rows, out=self.memory.keys)
        torch.index_select(memory.values, 0, rows, out=self.memory.values)
        end = memory.end_of(keys)
        assert end is not None
        self._set_slices(end - keys.shape[2], end)

    def _append(self, Q: int) -> tuple[Memory, int, int]:
        """Add slots for ``Q`` tokens, and return the memory and the slots that the last one sees."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        past, limit = keys.shape[2], self.kept
        # The first tokens of a prompt that is longer than the window are not stored
        added = Q if past or limit is None else min(Q, limit)
        memory = self.memory
        end = None if memory is None else memory.end_of(keys)
        if memory is None or end is None or end + added > memory.capacity:
            needed = past + added
            # Room for a quarter more, and for a page at least
            room = needed + max(PAGE, needed // 4)
            if self._max_length is not None:
                room = max(needed, min(room, self._max_length))
            memory = self.memory = Memory.allocate(keys, len(keys), -(-room // PAGE) * PAGE)
            memory.keys[:, :, :past] = keys
            memory.values[:, :, :past] = values
            end = past
        end += added
        seen = past if self.reach is None else min(past, self.reach)
        kept = past + added if limit is None else min(past + added, limit)
        self._set_slices(end - kept, end)
        return memory, end - added - seen, end

    def _set_slices(self, begin: int, end: int) -> None:
        assert self.memory is not None
        self.keys = self.memory.keys[:, :, begin:end]
        self.values = self.memory.values[:, :, begin:end]


class PagedSlidingWindowLayer(  # type: ignore[no-untyped-call]
    PagedLayer, DynamicSlidingWindowLayer
):
    """The keys and values of a layer that sees ``sliding_window`` tokens."""

    @property
    def reach(self) -> int | None:
        """The most tokens before a query that it sees."""
        return self.sliding_window - 1

    @property
    def kept(self) -> int | None:
        """The most tokens that are kept for later queries, all while a crop may follow."""
        return None if self.record_past else self.sliding_window - 1

    def _append(self, Q: int) -> tuple[Memory, int, int]:
        self.cumulative_length += Q
        return super()._append(Q)


class PagedCache(DynamicCache):
    """transformers' ``DynamicCache``, whose keys and values ``paged_attention`` reads.

    ``generate`` makes one unless another cache is asked for. A loop of one's own may pass one as
    ``past_key_values``. It keeps no gradients.

    Args:
        config: The model's config, or that of its text model.
        max_length: The most tokens that are expected. More are stored too.

    Attributes:
        graph: The step of the model that decodes with it, where that is a graph (``decode_graph``).
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        super().__init__(config=config)
        tables = LastTables()
        self.layers = [
            PagedSlidingWindowLayer(tables, max_length, sliding_window=layer.sliding_window)
            if isinstance(layer, DynamicSlidingWindowLayer)
            else PagedLayer(tables, max_length)
            for layer in self.layers
        ]
        self.graph: Any = None
        self._fixed: Tables | None = None

    @contextmanager
    def fixed(self, tables: Tables) -> Iterator[None]:
        """Begin no steps meanwhile: all are in slots that were added, at the places ``tables``."""
        self._fixed = tables
        try:
            yield
        finally:
            self._fixed = None

    def begin_step(self, layer_idx: int, key_states: Tensor, mask: Tensor | None) -> Step | None:
        """Begin the step of one layer, as ``PagedLayer.begin_step``."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, PagedLayer)
        if self._fixed is not None:
            assert layer.memory is not None
            return Step(layer.memory, self._fixed)
        return layer.begin_step(key_states, mask)


class Idefics2ForConditionalGeneration(  # type: ignore[no-untyped-call]
    transformers.Idefics2ForConditionalGeneration
):
    """transformers' class of the same name, which generates with a ``PagedCache``."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        parent: Any = super()
        prepare: Any = parent._prepare_cache_for_generation
        result = prepare(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        config = self.config.get_text_config(decoder=True)
        if (
            given is None
            and generation_config.cache_implementation is None
            and type(model_kwargs.get("past_key_values")) is DynamicCache
            and config._attn_implementation == NAME
            # Without no_grad, gradients through the cache may be wanted
            and not torch.is_grad_enabled()
        ):
            cache: Any = PagedCache(config, max_cache_length)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
        return result
