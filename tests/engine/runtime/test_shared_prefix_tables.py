"""When the shared prefixes of a decode step are found again."""

from dataclasses import replace

import numpy as np
import pytest

from idefics2_engine.model.config import TextConfig
from idefics2_engine.runtime import shared_prefix_tables
from idefics2_engine.runtime.input_batch import NOTHING, PackedStep, StepShape, padded
from idefics2_engine.runtime.shared_prefix_tables import SharedPrefixTables
from idefics2_engine.scheduling.shared_prefixes import find_shared_prefixes

ROWS, SHARED, PAGE, WINDOW = 32, 10, 64, 1024
TEXT = TextConfig(
    vocab_size=8,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=4096,
    sliding_window=WINDOW,
    pad_token_id=0,
)


def decode_step(rows: int = ROWS, own: int = 1, tokens: int = 5) -> PackedStep:
    """Return a step of sequences that share their first pages and have ``own`` further ones."""
    table = np.arange(rows * (SHARED + own), dtype=np.int32).reshape(rows, -1)
    table[:, :SHARED] = np.arange(SHARED) + 10**6
    lens = np.full(rows, SHARED * PAGE + tokens, np.int32)
    return replace(NOTHING, block_table=table, context_lens=lens)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an element for each search."""
    found: list[int] = []

    def search(block_tables: np.ndarray, *args: object, **options: object) -> np.ndarray:
        found.append(len(block_tables))
        return find_shared_prefixes(block_tables, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_prefix_tables, "find_shared_prefixes", search)
    return found


def test_table_is_kept_while_shared_pages_stay(searches: list[int]) -> None:
    tables = SharedPrefixTables(TEXT, PAGE)
    first = tables.find(decode_step())
    assert (first[:, 0] == SHARED).all()
    grown = decode_step()
    grown = replace(grown, block_table=np.pad(grown.block_table, ((0, 0), (0, 2))))
    assert tables.find(grown) is first
    assert searches == [ROWS]


@pytest.mark.parametrize("change", ["rows", "order", "page", "window"])
def test_table_is_found_again(change: str, searches: list[int]) -> None:
    tables = SharedPrefixTables(TEXT, PAGE)
    step = decode_step()
    step.block_table[ROWS // 2 :, :SHARED] += 100
    tables.find(step)
    other = replace(step, block_table=step.block_table.copy())
    if change == "rows":
        other = decode_step(ROWS - 1)
    elif change == "order":
        other.block_table[:] = step.block_table[::-1]
    elif change == "page":
        other.block_table[3, 2] += 5
    else:
        other = replace(other, context_lens=np.full(ROWS, WINDOW + 1, np.int32))
    found = tables.find(other)
    assert len(searches) == 2
    fresh = SharedPrefixTables(TEXT, PAGE).find(other)
    np.testing.assert_array_equal(found, fresh)


def test_padding_shares_nothing() -> None:
    step = decode_step()
    step = replace(
        step,
        input_ids=np.zeros(ROWS, np.int32),
        positions=np.zeros(ROWS, np.int32),
        slots=np.zeros(ROWS, np.int32),
        cu_seqlens=np.arange(ROWS + 1, dtype=np.int32),
        shared_prefixes=SharedPrefixTables(TEXT, PAGE).find(step),
    )
    wide = padded(step, StepShape(ROWS + 8, ROWS + 8, SHARED + 4, has_shared=True))
    np.testing.assert_array_equal(wide.shared_prefixes[:ROWS], step.shared_prefixes)
    assert not wide.shared_prefixes[ROWS:].any()
    empty = padded(NOTHING, StepShape(8, 8, SHARED, has_shared=True)).shared_prefixes
    assert empty.shape == (8, 6)
    assert not empty.any()
