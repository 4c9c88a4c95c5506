"""Memory for keys and values that is rows for transformers and pages for ``paged_attention``.

The memory of a layer is (B, H_KV, capacity, D), with free slots for tokens to come. Token t of a
padded row is at slot t, so the tensors that transformers' operations expect are slices of it.

``paged_attention`` reads the same memory as pages of 64 slots that overlap: one begins at each
slot. The first page of a row begins at its first token, whatever padding is on the left of it, or
where the window begins.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idefics2_engine.hf.attention import left_padding

PAGE = 64
"""Slots of a page."""


@dataclass(frozen=True)
class Memory:
    """The keys and values of a layer, and views of them as pages.

    Attributes:
        keys: (B, H_KV, capacity, D). Row b begins at slot b * H_KV * capacity.
        values: As ``keys``.
        key_pages: (pages, H_KV, PAGE, D). Page p begins at slot p.
        value_pages: As ``key_pages``.
    """

    keys: Tensor
    values: Tensor
    key_pages: Tensor
    value_pages: Tensor

    @classmethod
    def allocate(cls, like: Tensor, B: int, capacity: int) -> "Memory":
        """Allocate ``B`` rows of ``capacity`` slots, with heads as in ``like`` (any, H_KV, any, D)."""
        _, H_KV, _, D = like.shape
        slots = B * H_KV * capacity
        # The last page of the last row reaches beyond its last slot
        flat = [like.new_empty((slots + PAGE) * D) for _ in range(2)]
        keys, values = (t[: slots * D].view(B, H_KV, capacity, D) for t in flat)
        pages = (slots - (H_KV - 1) * capacity, H_KV, PAGE, D)
        key_pages, value_pages = (t.as_strided(pages, (D, capacity * D, D, 1)) for t in flat)
        return cls(keys, values, key_pages, value_pages)

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.keys.shape[2]

    def end_of(self, keys: Tensor) -> int | None:
        """Return the slot behind ``keys``, or ``None`` if it is no slice that may be extended."""
        own = self.keys
        if (
            keys.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()
            or keys.shape[:2] != own.shape[:2]
            # Memory of inference mode is written in that mode alone
            or (own.is_inference() and not torch.is_inference_mode_enabled())
        ):
            return None
        return keys.storage_offset() // keys.shape[3] + keys.shape[2]


class Tables(NamedTuple):
    """The places of a forward's tokens, which are the same in the memory of all layers."""

    # (B * Q,), the places of new tokens in the flattened rows
    slots: Tensor
    # (B, width) int32; entries after the last page of a row are not read
    block_table: Tensor
    # (B,) int32, the tokens of each row without padding, the new ones included
    context_lens: Tensor
    # (B + 1,) int32
    cu_seqlens: Tensor


class Step(NamedTuple):
    """Where a layer writes and reads the tokens of one forward."""

    memory: Memory
    tables: Tables


class LastTables:
    """The tables of the last forward, made by its first layer."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._padding: Tensor | None = None
        self._made_for: tuple[Any, ...] = ()
        self._tables: Tables | None = None

    def accepts(self, mask: Tensor | None) -> bool:
        """Return whether ``mask`` hides nothing but padding on the left and what follows a query."""
        if mask is not self._mask:
            self._mask, self._tables = mask, None
            self._padding = None if mask is None else left_padding(mask)
        return mask is None or self._padding is not None

    def get(self, memory: Memory, begin: int, end: int, Q: int) -> Tables:
        """Return the tables of rows in the slots from ``begin`` to ``end``, of which ``Q`` are new."""
        made_for = (memory.keys.shape, memory.keys.device, begin, end, Q)
        if self._tables is None or self._made_for != made_for:
            self._tables = make_tables(memory, self._padding, begin, end, Q)
            self._made_for = made_for
        return self._tables


def make_tables(memory: Memory, padding: Tensor | None, begin: int, end: int, Q: int) -> Tables:
    """Return the places of rows in the slots from ``begin`` to ``end``, of which ``Q`` are new.

    The first of ``padding`` (B,) of these slots are padding, or none if it is ``None``.
    """
    B, H_KV, capacity, _ = memory.keys.shape
    # Kernels compile for the width. It is constant up to 4,096 tokens, and then seldom grows
    width = max(64, 1 << (-(-capacity // PAGE) - 1).bit_length())
    rows, pages, new = (
        torch.arange(*bounds, device=memory.keys.device)
        for bounds in ((B,), (begin, begin + width * PAGE, PAGE), (end - Q, end))
    )
    if padding is None:
        padding = torch.zeros_like(rows)
    first = rows * (H_KV * capacity) + padding
    return Tables(
        (rows[:, None] * capacity + new).flatten(),
        (first[:, None] + pages).int(),
        (end - begin - padding).int(),
        torch.arange(0, (B + 1) * Q, Q, dtype=torch.int32, device=rows.device),
    )
