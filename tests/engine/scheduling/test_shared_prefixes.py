"""Groups of sequences that share leading pages, found from block tables on the host alone."""

from collections import Counter
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from idefics2_engine.scheduling import shared_prefixes
from idefics2_engine.scheduling.shared_prefixes import (
    MIN_MEMBERS,
    MIN_PAGES,
    Ints,
    can_share,
    find_shared_prefixes,
)
from idefics2_kernels.attention import decode_attention, shared_prefix

P = 64
DEFAULTS: dict[str, Any] = {"page_size": P, "window": 4096, "num_kv_heads": 8, "max_members": 16}


def tables_of(*groups: tuple[int, int], own: int = 2) -> Ints:
    """Return the block tables of groups of (sequences, shared pages), with ``own`` pages each."""
    rows, page = [], 1
    for count, shared in groups:
        prefix = list(range(page, page + shared))
        page += shared
        for _ in range(count):
            rows.append([*prefix, *range(page, page + own)])
            page += own
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int32)


def find(tables: Ints, lens: Ints | None = None, **options: Any) -> Ints:
    """Find the groups of ``tables``, whose sequences fill their pages unless ``lens`` are given."""
    lens = P * (tables != 0).sum(1).astype(np.int32) if lens is None else lens
    return find_shared_prefixes(tables, lens, **DEFAULTS | options)


def check(found: Ints, tables: Ints, lens: Ints, window: int, max_members: int) -> None:
    """Check that ``found`` keeps the contract of ``paged_attention``."""
    assert found.dtype == np.int32
    assert found.shape == (len(tables), 6)
    computed: Counter[tuple[int, int]] = Counter()
    for _, _, _, begin, end, part in found.tolist():
        members = found[begin:end, 2]
        assert len(members) <= max_members
        for b in members.tolist():
            computed[b, part] += 1
            pages = found[b, 0]
            assert tuple(found[b, :2]) == tuple(found[members[0], :2])
            assert np.array_equal(tables[b, :pages], tables[members[0], :pages])
    expected = {(b, part): 1 for b, row in enumerate(found) for part in range(row[1])}
    assert computed == expected
    for (pages, parts), T in zip(found[:, :2].tolist(), lens.tolist(), strict=True):
        assert (pages > 0) == (parts > 0)
        assert pages * P < max(T, 1)
        assert parts <= 7
        if parts:
            assert window >= T
            # No part is empty.
            assert (parts - 1) * -(-pages // parts) < pages


def saved(found: Ints, tables: Ints) -> int:
    """Return how many reads of pages the groups of ``found`` save."""
    groups = Counter(tuple(t[:n].tolist()) for t, n in zip(tables, found[:, 0], strict=True))
    return sum((count - 1) * len(pages) for pages, count in groups.items())


def test_a_batch_about_one_prefix_is_one_group() -> None:
    tables = tables_of((256, 16))
    found = find(tables)
    assert (found[:, 0] == 16).all()
    # 16 items of 16 sequences, each in two parts: 256 programs for 8 key heads.
    assert (found[:, 1] == 2).all()
    assert (found[:, 4] > found[:, 3]).sum() == 32
    check(found, tables, np.full(256, 18 * P), 4096, 16)


@pytest.mark.parametrize(
    ("tables", "options"),
    [
        (tables_of((40, 0)), {}),
        (tables_of((MIN_MEMBERS - 1, 30)), {}),
        (tables_of((40, MIN_PAGES - 1)), {}),
        (tables_of((40, 30)), {"window": 31 * P}),
        (tables_of((40, 30)), {"max_members": 1}),
        (tables_of((0, 1), (1, 0))[:0], {}),
    ],
    ids=["nothing", "few sequences", "few pages", "window", "one member", "no sequence"],
)
def test_what_does_not_pay_is_not_shared(tables: Ints, options: dict[str, Any]) -> None:
    assert not find(tables, **options).any()


def test_the_threshold_is_the_first_that_shares() -> None:
    assert (find(tables_of((MIN_MEMBERS, MIN_PAGES)))[:, 0] == MIN_PAGES).all()


def test_the_page_of_the_new_token_is_not_shared() -> None:
    tables = tables_of((8, 9), own=0)
    assert (find(tables)[:, 0] == 8).all()
    assert (find(tables, np.full(8, 9 * P + 1, np.int32))[:, 0] == 9).all()


def test_a_sequence_in_its_prefix_does_not_divide_the_group() -> None:
    tables = tables_of((9, 20))
    lens = np.full(9, 21 * P, np.int32)
    lens[4] = 6 * P
    found = find(tables, lens)
    assert found[:, 0].tolist() == [20, 20, 20, 20, 0, 20, 20, 20, 20]
    check(found, tables, lens, 4096, 16)


def test_sequences_past_their_window_are_alone() -> None:
    tables = tables_of((9, 9))
    lens = np.full(9, 9 * P + 9, np.int32)
    lens[2] = 700
    found = find(tables, lens, window=600)
    assert found[:, 0].tolist() == [9, 9, 0, 9, 9, 9, 9, 9, 9]


def test_the_longer_prefixes_of_large_groups_win() -> None:
    """Eight answers share 30 pages, all 64 share eight of them."""
    tables = np.concatenate([tables_of((8, 22)) + 1000 * i for i in range(8)])
    tables = np.concatenate([np.tile(np.arange(1, 9, dtype=np.int32), (64, 1)), tables], 1)
    assert (find(tables)[:, 0] == 30).all()
    # Six groups of four sequences save 6 * 3 * 9 pages, all together 23 * 8.
    tables = np.concatenate([tables_of((4, 1)) + 1000 * i for i in range(6)])
    tables = np.concatenate([np.tile(np.arange(1, 9, dtype=np.int32), (24, 1)), tables], 1)
    assert (find(tables)[:, 0] == 8).all()


def test_random_trees_keep_the_contract_and_save_most() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        B, W = int(random.integers(1, 70)), int(random.integers(1, 20))
        tables = np.zeros((B, W), np.int32)
        # A sequence copies the start of an earlier one, or has new pages.
        for b in range(B):
            tables[b] = 1000 + b * W + np.arange(W)
            if b and random.random() < 0.9:
                depth = int(random.integers(0, W + 1))
                tables[b, :depth] = tables[random.integers(b // 8, b), :depth]
        lens = random.integers(
            0 if random.random() < 0.2 else W * P - P, W * P + 1, B, dtype=np.int32
        )
        window, max_members = int(random.choice([W * P - 40, 4096])), int(random.choice([2, 3, 16]))
        options = {"window": window, "max_members": max_members}
        found = find(tables, lens, **options, num_kv_heads=int(random.choice([1, 8])))
        check(found, tables, lens, window, max_members)
        # No single length of prefix for all would save more.
        limits = np.where(lens > window, 0, (lens - 1) // P)
        for depth in range(MIN_PAGES, W + 1):
            sharing = Counter(
                tuple(t[:depth].tolist()) for t, n in zip(tables, limits, strict=True) if n >= depth
            )
            alone = sum((n - 1) * depth for n in sharing.values() if n >= MIN_MEMBERS)
            assert saved(found, tables) >= alone


@pytest.mark.parametrize("max_members", [2, 3, 16])
def test_there_is_never_an_item_too_many(max_members: int) -> None:
    for size, shared in product((4, 5, 9, 17, 33), (4, 7, 50)):
        tables = tables_of(*((size, shared),) * 6)
        lens = np.full(len(tables), (shared + 2) * P, np.int32)
        found = find(tables, lens, max_members=max_members)
        check(found, tables, lens, 4096, max_members)


def test_order_of_the_rows_changes_no_division() -> None:
    """Two runs give the same bits only if a group is divided in the same way each time."""
    tables = tables_of((30, 12), (20, 7), (9, 0))
    order = np.random.default_rng(1).permutation(len(tables))
    straight, mixed = find(tables), find(tables[order])
    assert np.array_equal(straight[order, :2], mixed[:, :2])


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 32])
def test_a_batch_with_a_table_is_not_split_without_one(num_kv_heads: int) -> None:
    sizes = [size for size in range(1, 300) if can_share(size, num_kv_heads)]
    assert all(decode_attention.PROGRAMS // (size * num_kv_heads) <= 1 for size in sizes)
    assert min(sizes) == -(-128 // num_kv_heads)


def test_members_of_an_item_are_divided_evenly() -> None:
    found = find(tables_of((17, 12)))
    sizes = sorted({int(end - begin) for begin, end in found[:, 3:5] if end > begin})
    assert all(b - a <= 1 for a, b in pairwise(sizes))
    assert max(sizes) == 9


def test_the_layout_is_that_of_the_kernel() -> None:
    assert shared_prefix.COLUMNS.value == shared_prefixes.COLUMNS
    assert shared_prefix.MAX_PARTS.value == shared_prefixes.MAX_PARTS
