"""The sequences that draw a token in a step, with their sampling parameters as arrays."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from idefics2_engine.scheduling.sampling_columns import Columns, sampling_columns
from idefics2_engine.scheduling.sequence import Sequence
from idefics2_engine.scheduling.sequence_table import SequenceTable


@dataclass(frozen=True)
class DrawBatch:
    """B sequences that draw a token, in the order of their rows of logits.

    Attributes:
        sequences: (B,) the sequences.
        columns: (B,) their sampling parameters.
        indices: (B,) index of the token in each answer.
    """

    sequences: npt.NDArray[np.object_]
    columns: Columns
    indices: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Items[Sequence]) -> "DrawBatch":
        """Build from ``sequences``, one by one."""
        owners = np.empty(len(sequences), object)
        owners[:] = sequences
        indices = np.array([sequence.num_drawn for sequence in sequences], np.int64)
        return cls(owners, sampling_columns(sequences), indices)

    @classmethod
    def of_rows(cls, table: SequenceTable, rows: npt.NDArray[np.int64]) -> "DrawBatch":
        """Build from running sequences."""
        lengths = table.num_known[rows] + table.num_pending[rows]
        return cls(table.owners[rows], table.records[rows], lengths - table.num_prompt[rows])

    def column(self, name: str) -> np.ndarray:
        """Return a copy of the parameter ``name`` (B,), which has no gaps as the column has."""
        return self.columns[name].copy()
