"""The inputs of a step as packed arrays on the host, ready to be copied to the device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.model.batch import PagedView, TextBatch
from idefics2_engine.scheduling.page_allocator import NO_PAGE
from idefics2_engine.scheduling.scheduler import Chunk, Step
from idefics2_engine.scheduling.sequence import Sequence

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackedStep:
    """B chunks packed into T tokens.

    Attributes:
        input_ids: (T,) token ids. A negative value, -1 - row, stands for the token that the
            previous step draws in that row.
        positions: (T,) positions in the sequences.
        slots: (T,) places in the KV cache: page * page size + offset.
        cu_seqlens: (B + 1,) first token of each chunk, then T.
        context_lens: (B,) tokens of each sequence, this step's included.
        block_table: (B, W) pages of each sequence.
        logits_indices: Tokens whose logits are needed.
        image_rows: Row of the encoder cache for each image token, in order.
        max_seqlen: Tokens of the longest chunk.
        is_decode: Whether every chunk is one text token that draws the next one.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    cu_seqlens: Ints
    context_lens: Ints
    block_table: Ints
    logits_indices: Ints
    image_rows: Ints
    max_seqlen: int
    is_decode: bool

    def arrays(self) -> list[Ints]:
        """Return all arrays, flat, in the order in which ``text_batch`` expects their copies."""
        return [
            self.input_ids,
            self.positions,
            self.slots,
            self.cu_seqlens,
            self.context_lens,
            self.block_table.ravel(),
            self.logits_indices,
            self.image_rows,
        ]


def pack(step: Step, drawn: Mapping[Sequence, int], page_size: int, num_latents: int) -> PackedStep:
    """Pack the chunks of ``step``; ``drawn`` maps sequences to rows of the previous step."""
    chunks = step.chunks
    begins = np.array([chunk.begin for chunk in chunks], np.int32)
    lengths = np.array([chunk.end for chunk in chunks], np.int32) - begins
    cu_seqlens = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    owners = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(len(owners), dtype=np.int32) + (begins - cu_seqlens[:-1])[owners]
    tables = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    slots = tables[owners, positions // page_size] * page_size + positions % page_size
    # Kernels never read these entries, but every entry must be a valid page
    tables[tables == NO_PAGE] = 0
    return PackedStep(
        input_ids=np.array(
            [token for chunk in chunks for token in _tokens(chunk, drawn)], np.int32
        ),
        positions=positions,
        slots=slots,
        cu_seqlens=cu_seqlens,
        context_lens=begins + lengths,
        block_table=tables,
        logits_indices=_wanted(chunks, cu_seqlens),
        image_rows=_image_rows(chunks, num_latents),
        max_seqlen=int(lengths.max()),
        is_decode=all(
            chunk.samples and chunk.end - chunk.begin == 1 and not chunk.scores and not chunk.images
            for chunk in chunks
        ),
    )


_NONE = np.zeros(0, np.int32)
NOTHING = PackedStep(
    input_ids=_NONE,
    positions=_NONE,
    slots=_NONE,
    cu_seqlens=np.zeros(1, np.int32),
    context_lens=_NONE,
    block_table=_NONE.reshape(0, 0),
    logits_indices=_NONE,
    image_rows=_NONE,
    max_seqlen=1,
    is_decode=True,
)
"""A step without chunks, for ``padded``."""


def padded(packed: PackedStep, size: int, width: int) -> PackedStep:
    """Return ``packed`` padded to ``size`` decoding sequences with ``width`` pages each.

    Padding sequences have no query, so kernels neither read nor write for them.
    """
    count = len(packed.input_ids)
    table = np.zeros((size, width), np.int32)
    table[:count, : packed.block_table.shape[1]] = packed.block_table

    def filled(array: Ints, length: int, value: int) -> Ints:
        return np.pad(array, (0, length - len(array)), constant_values=value)

    return replace(
        packed,
        input_ids=filled(packed.input_ids, size, 0),
        positions=filled(packed.positions, size, 0),
        slots=filled(packed.slots, size, -1),
        cu_seqlens=filled(packed.cu_seqlens, size + 1, count),
        context_lens=filled(packed.context_lens, size, 0),
        block_table=table,
        logits_indices=_NONE,
    )


def resolve_pending_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """Replace each negative id, -1 - row, in ``input_ids`` (T,) by ``last_tokens[row]``."""
    rows = (-1 - input_ids).clamp(min=0)
    return torch.where(input_ids < 0, last_tokens[rows], input_ids)


def text_batch(
    copies: list[Tensor], input_ids: Tensor, packed: PackedStep, *, every_row: bool = False
) -> TextBatch:
    """Build a batch from the device's copies of ``packed.arrays()``.

    Args:
        copies: The copies, in the same order.
        input_ids: (T,) resolved token ids.
        packed: The step on the host.
        every_row: Whether all tokens get logits.
    """
    _, positions, slots, cu_seqlens, context_lens, block_table, logits_indices, _ = copies
    return TextBatch(
        input_ids=input_ids,
        positions=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=packed.max_seqlen,
        logits_indices=None if every_row else logits_indices,
        paged=PagedView(
            slots=slots,
            block_table=block_table.view(packed.block_table.shape),
            context_lens=context_lens,
        ),
    )


def _tokens(chunk: Chunk, drawn: Mapping[Sequence, int]) -> list[int]:
    known = chunk.sequence.token_ids[chunk.begin : chunk.end]
    if len(known) < chunk.end - chunk.begin:
        known.append(-1 - drawn[chunk.sequence])
    return known


def _wanted(chunks: list[Chunk], cu_seqlens: Ints) -> Ints:
    """Return the tokens whose logits are needed: scored prompt tokens and sampling tokens."""
    wanted = [
        place - chunk.begin + offset
        for chunk, offset in zip(chunks, cu_seqlens.tolist(), strict=False)
        for place in (*chunk.scores, *([chunk.end - 1] if chunk.samples else []))
    ]
    return np.array(wanted, np.int32)


def _image_rows(chunks: list[Chunk], num_latents: int) -> Ints:
    rows = [
        np.arange(max(item.begin, chunk.begin), min(item.end, chunk.end), dtype=np.int32)
        + (entry * num_latents - item.begin)
        for chunk in chunks
        for item, entry in chunk.images
    ]
    return np.concatenate([*rows, _NONE]).astype(np.int32)
