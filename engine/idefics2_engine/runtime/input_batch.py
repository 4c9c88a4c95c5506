"""The inputs of a step as packed arrays on the host, ready to be copied to the device."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from idefics2_engine.model.batch import PagedView, TextBatch
from idefics2_engine.scheduling.page_allocator import NO_PAGE
from idefics2_engine.scheduling.shared_prefixes import COLUMNS
from idefics2_engine.scheduling.step import Chunk, Step

Ints = npt.NDArray[np.int32]
SAMPLED = 6
"""Place of ``PackedStep.sampled`` in ``PackedStep.arrays``."""


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
        sampled: Tokens whose logits choose the next token, one for each chunk that samples.
        scored: Prompt tokens whose logits score the following token.
        feature_rows: (T,) row of the encoder cache for an image token, -1 for other tokens. Empty
            if no chunk has an image.
        shared_prefixes: (B, 6) prefixes that decoding sequences share, as ``Ops.paged_attention``
            takes them. Empty if they are not looked for.
        max_seqlen: Tokens of the longest chunk.
        is_decode: Whether every chunk is one text token that draws the next one.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    cu_seqlens: Ints
    context_lens: Ints
    block_table: Ints
    sampled: Ints
    scored: Ints
    feature_rows: Ints
    shared_prefixes: Ints
    max_seqlen: int
    is_decode: bool

    def arrays(self) -> list[Ints]:
        """Return the arrays of a forward pass, flat, in the order that ``text_batch`` expects."""
        return [
            self.input_ids,
            self.positions,
            self.slots,
            self.cu_seqlens,
            self.context_lens,
            self.block_table.ravel(),
            self.sampled,
            self.feature_rows,
            self.shared_prefixes.ravel(),
        ]


@dataclass(frozen=True)
class StepShape:
    """Sizes to which a step is padded.

    Attributes:
        tokens: Tokens.
        sequences: Chunks.
        width: Pages of a sequence.
        rows: Tokens that sample. 0 if every token does.
        has_images: Whether tokens may be image tokens.
        has_shared: Whether sequences may share prefixes.
    """

    tokens: int
    sequences: int
    width: int
    rows: int = 0
    has_images: bool = False
    has_shared: bool = False


def pack(step: Step, page_size: int, num_latents: int) -> PackedStep:
    """Pack the tokens of ``step``: those of sequences that move on, then those of the chunks."""
    decodes, chunks = step.decodes, step.chunks
    pages = [chunk.sequence.pages for chunk in chunks]
    num_decodes = len(decodes.rows)
    begins = np.empty(step.num_sequences, np.int32)
    begins[:num_decodes] = decodes.positions
    begins[num_decodes:] = [chunk.begin for chunk in chunks]
    lengths = np.ones(len(begins), np.int32)
    lengths[num_decodes:] = [chunk.end - chunk.begin for chunk in chunks]
    cu_seqlens = np.zeros(len(begins) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    owners = np.repeat(np.arange(len(begins)), lengths)
    positions = np.arange(len(owners), dtype=np.int32) + (begins - cu_seqlens[:-1])[owners]
    width = max(decodes.block_table.shape[1], max(map(len, pages), default=0))
    tables = np.zeros((len(begins), width), np.int32)
    tables[:num_decodes, : decodes.block_table.shape[1]] = decodes.block_table
    for row, own in enumerate(pages, num_decodes):
        tables[row, : len(own)] = own
    slots = tables[owners, positions // page_size] * page_size + positions % page_size
    # Kernels never read these entries, but every entry must be a valid page
    tables[tables == NO_PAGE] = 0
    input_ids = np.empty(len(owners), np.int32)
    input_ids[:num_decodes] = decodes.token_ids
    input_ids[num_decodes:] = [token for chunk in chunks for token in chunk.token_ids]
    firsts, ends = cu_seqlens[num_decodes:-1].tolist(), cu_seqlens[num_decodes + 1 :]
    samples = np.array([chunk.samples for chunk in chunks], np.bool_)
    return PackedStep(
        input_ids=input_ids,
        positions=positions,
        slots=slots,
        cu_seqlens=cu_seqlens,
        context_lens=begins + lengths,
        block_table=tables,
        sampled=np.concatenate([np.arange(num_decodes, dtype=np.int32), ends[samples] - 1]),
        scored=_scored(chunks, firsts),
        feature_rows=_feature_rows(chunks, firsts, len(owners), num_latents),
        shared_prefixes=_NO_PREFIXES,
        max_seqlen=int(lengths.max()),
        is_decode=all(
            chunk.samples and chunk.end - chunk.begin == 1 and not chunk.scores and not chunk.images
            for chunk in chunks
        ),
    )


_NONE = np.zeros(0, np.int32)
_NO_PREFIXES = _NONE.reshape(0, COLUMNS)
NOTHING = PackedStep(
    input_ids=_NONE,
    positions=_NONE,
    slots=_NONE,
    cu_seqlens=np.zeros(1, np.int32),
    context_lens=_NONE,
    block_table=_NONE.reshape(0, 0),
    sampled=_NONE,
    scored=_NONE,
    feature_rows=_NONE,
    shared_prefixes=_NO_PREFIXES,
    max_seqlen=1,
    is_decode=True,
)
"""A step without chunks, for ``padded``."""


def padded(packed: PackedStep, shape: StepShape) -> PackedStep:
    """Return ``packed`` padded to ``shape``, which it must fit.

    Padding tokens belong to no sequence and have no slot, and padding sequences have no query, so
    kernels neither read nor write the KV cache for them.
    """
    count, sequences = len(packed.input_ids), len(packed.context_lens)
    table = np.zeros((shape.sequences, shape.width), np.int32)
    table[:sequences, : packed.block_table.shape[1]] = packed.block_table
    shared = _NO_PREFIXES
    if shape.has_shared:
        shared = np.zeros((shape.sequences, COLUMNS), np.int32)
        shared[: len(packed.shared_prefixes)] = packed.shared_prefixes
    return replace(
        packed,
        input_ids=_filled(packed.input_ids, shape.tokens, 0),
        positions=_filled(packed.positions, shape.tokens, 0),
        slots=_filled(packed.slots, shape.tokens, -1),
        cu_seqlens=_filled(packed.cu_seqlens, shape.sequences + 1, count),
        context_lens=_filled(packed.context_lens, shape.sequences, 0),
        block_table=table,
        sampled=_filled(packed.sampled, shape.rows, 0) if shape.rows else _NONE,
        feature_rows=(
            _filled(packed.feature_rows, shape.tokens, -1) if shape.has_images else _NONE
        ),
        shared_prefixes=shared,
    )


def _filled(array: Ints, length: int, value: int) -> Ints:
    out = np.full(length, value, np.int32)
    out[: len(array)] = array
    return out


def resolve_pending_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """Replace each negative id, -1 - row, in ``input_ids`` (T,) by ``last_tokens[row]``."""
    rows = (-1 - input_ids).clamp(min=0)
    return torch.where(input_ids < 0, last_tokens[rows], input_ids)


def text_batch(copies: list[Tensor], input_ids: Tensor, packed: PackedStep) -> TextBatch:
    """Build a batch from the device's copies of ``packed.arrays()``.

    Args:
        copies: The copies, in the same order.
        input_ids: (T,) resolved token ids.
        packed: The step on the host.
    """
    _, positions, slots, cu_seqlens, context_lens, block_table, _, feature_rows, shared = copies
    return TextBatch(
        input_ids=input_ids,
        positions=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=packed.max_seqlen,
        paged=PagedView(
            slots=slots,
            block_table=block_table.view(packed.block_table.shape),
            context_lens=context_lens,
            shared_prefixes=shared.view(-1, COLUMNS) if len(shared) else None,
        ),
        feature_rows=feature_rows if len(feature_rows) else None,
    )


def _scored(chunks: list[Chunk], firsts: list[int]) -> Ints:
    """Return the prompt tokens that are scored; ``firsts`` are the first tokens of the chunks."""
    rows = [
        np.arange(chunk.scores.start, chunk.scores.stop, dtype=np.int32) - chunk.begin + offset
        for chunk, offset in zip(chunks, firsts, strict=True)
        if chunk.scores
    ]
    return np.concatenate([*rows, _NONE])


def _feature_rows(
    chunks: list[Chunk], firsts: list[int], num_tokens: int, num_latents: int
) -> Ints:
    if not any(chunk.images for chunk in chunks):
        return _NONE
    rows = np.full(num_tokens, -1, np.int32)
    for chunk, offset in zip(chunks, firsts, strict=True):
        for item, entry in chunk.images:
            begin, end = max(item.begin, chunk.begin), min(item.end, chunk.end)
            first = begin - chunk.begin + offset
            rows[first : first + end - begin] = np.arange(
                entry * num_latents + begin - item.begin, entry * num_latents + end - item.begin
            )
    return rows
