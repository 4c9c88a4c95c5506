"""Which prefixes the sequences of a decode step share, found again only when that may change."""

import numpy as np
import numpy.typing as npt

from idefics2_engine.model.config import TextConfig
from idefics2_engine.runtime.input_batch import PackedStep
from idefics2_engine.scheduling.shared_prefixes import COLUMNS, can_share, find_shared_prefixes
from idefics2_kernels.attention.shared_prefix import max_members

Ints = npt.NDArray[np.int32]


class SharedPrefixTables:
    """Makes the argument ``shared_prefixes`` of ``Ops.paged_attention`` for decode steps.

    Args:
        text: Sizes of the text model.
        page_size: Tokens of a page.
    """

    def __init__(self, text: TextConfig, page_size: int) -> None:
        self._window = text.sliding_window
        self._num_kv_heads = text.num_kv_heads
        self._max_members = max_members(text.num_heads // text.num_kv_heads)
        self._page_size = page_size
        self._block_table: Ints = np.zeros((0, 0), np.int32)
        self._table: Ints = np.zeros((0, COLUMNS), np.int32)

    def can_share(self, size: int) -> bool:
        """Return whether steps of ``size`` sequences, padding included, have a table."""
        return can_share(size, self._num_kv_heads)

    def find(self, packed: PackedStep) -> Ints:
        """Return the table (B, 6) of a decode step."""
        if not self._is_valid(packed):
            self._block_table = packed.block_table.copy()
            self._table = find_shared_prefixes(
                packed.block_table,
                packed.context_lens,
                page_size=self._page_size,
                window=self._window,
                num_kv_heads=self._num_kv_heads,
                max_members=self._max_members,
            )
        return self._table

    def _is_valid(self, packed: PackedStep) -> bool:
        """Return whether the last table holds: its shared pages are the rows' first pages still."""
        last, now = self._block_table, packed.block_table
        if len(last) != len(now) or (
            self._window is not None and packed.context_lens.max() > self._window
        ):
            return False
        width = min(last.shape[1], now.shape[1])
        shared = np.arange(width) < self._table[:, :1]
        return (
            bool(((last[:, :width] == now[:, :width]) | ~shared).all())
            and not (self._table[:, 0] > width).any()
        )
