"""The work of one step, as the scheduler plans it and the runner computes it; host only."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from idefics2_engine.scheduling.placeholders import Encodable, ImageItem
from idefics2_engine.scheduling.sequence import Request, Sequence
from idefics2_engine.scheduling.sequence_table import Ints, Owners

StepKind = Literal["decode", "text", "image"]
"""An image step encodes tiles, a decode step computes one token of each sequence."""


@dataclass(frozen=True)
class Decodes:
    """D sequences of which a step computes the last token, to draw the next one.

    Attributes:
        rows: (D,) their rows in the table.
        sequences: (D,) the sequences.
        positions: (D,) positions of these tokens.
        token_ids: (D,) the tokens. A negative value, -1 - row, stands for the token that the
            previous step draws in that row.
        block_table: (D, W) pages of each sequence.
    """

    rows: Ints
    sequences: Owners
    positions: Ints
    token_ids: Ints
    block_table: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """Tokens [``begin``, ``end``) of a sequence that needs more than its next token.

    Attributes:
        sequence: The sequence.
        begin: First token.
        end: One past the last token.
        token_ids: The tokens. A negative value, -1 - row, stands for the token that the previous
            step draws in that row.
        samples: Whether the chunk ends the sequence, so that the next token is drawn.
        scores: Prompt positions whose logits score the following token.
        images: Images with a token in the chunk, and their encoder cache entries.
    """

    sequence: Sequence
    begin: int
    end: int
    token_ids: list[int]
    samples: bool
    scores: range
    images: list[tuple[ImageItem, int]]


@dataclass(frozen=True)
class Step:
    """The work of one forward pass: encode tiles, copy pages, then compute the tokens.

    Attributes:
        decodes: Sequences that move on by a token. They come before the chunks.
        chunks: Tokens of the other sequences.
        encodes: Tiles to encode, and their encoder cache entries.
        copies: Pages to copy, each (from, to).
        cached_tokens: Tokens that the prefix cache had of the sequences admitted in this step.
        cached_tiles: Tiles of this step's chunks that the encoder cache had, and tiles whose tokens
            are among ``cached_tokens``.
    """

    decodes: Decodes
    chunks: list[Chunk]
    encodes: list[tuple[Encodable, int]]
    copies: list[tuple[int, int]]
    cached_tokens: int = 0
    cached_tiles: int = 0

    @cached_property
    def kind(self) -> StepKind:
        """Say what the step does: encode tiles, else decode one token a chunk, else compute text."""
        if self.encodes:
            return "image"
        return "decode" if self.num_tokens == self.num_sequences else "text"

    @property
    def num_sequences(self) -> int:
        """Sequences of which the step computes tokens."""
        return len(self.decodes.rows) + len(self.chunks)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decodes.rows) + sum(chunk.end - chunk.begin for chunk in self.chunks)

    @property
    def requests(self) -> set[Request]:
        """The requests of these sequences."""
        sequences = [*self.decodes.sequences, *(chunk.sequence for chunk in self.chunks)]
        return {sequence.request for sequence in sequences}
