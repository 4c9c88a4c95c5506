"""Groups of decoding sequences whose leading pages are read once for all of them.

``find_shared_prefixes`` makes the argument ``shared_prefixes`` of ``Ops.paged_attention``. The
kernel's layout is explained there (``idefics2_kernels.reference.attention.paged_attention``).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
_Integers = npt.NDArray[np.integer[Any]]

# Columns of the table, of which the first two belong to sequence b.
COLUMNS = 6
_PAGES, _PARTS, _MEMBER, _BEGIN, _END, _PART = range(COLUMNS)
# Batches of fewer sequences times key heads decode faster without the table, because each sequence is
# split among programs. From here on none is, so a table without groups changes no bit.
_MIN_PROGRAMS = 128
# A group shares only if it has as many sequences and pages. Each member stores and reads partial
# states and counts an arrival, where it saves its reads of the pages.
MIN_MEMBERS = 4
MIN_PAGES = 8
# The most parts of a group's pages, and the least pages of a part.
MAX_PARTS = 7
_MIN_PART = 2
# Programs that run at once on an H100, two on each SM. The number is the same on every GPU, because
# the order of sums depends on it.
_PROGRAMS = 2 * 132


def can_share(size: int, num_kv_heads: int) -> bool:
    """Return whether batches of ``size`` sequences, padding included, should have a table."""
    return size * num_kv_heads >= _MIN_PROGRAMS


def find_shared_prefixes(
    block_tables: Ints,
    context_lens: Ints,
    *,
    page_size: int,
    window: int | None,
    num_kv_heads: int,
    max_members: int,
) -> Ints:
    """Find the shared prefixes of B decoding sequences: (B, 6).

    Rows of zeros may follow for sequences that pad the batch.

    Args:
        block_tables: (B, W) pages of each sequence.
        context_lens: (B,) tokens of each sequence, this step's included.
        page_size: Tokens of a page.
        window: Keys that a query sees, its own included, or ``None`` for all. Sequences that are
            longer share nothing.
        num_kv_heads: Key heads of the model.
        max_members: Most sequences that one program computes
            (``idefics2_kernels.attention.shared_prefix.max_members``).
    """
    B, W = block_tables.shape
    table = np.zeros((B, COLUMNS), np.int32)
    # The page of this step's token is not shared.
    limits = np.minimum((context_lens - 1) // page_size, W)
    if window is not None:
        limits = np.where(context_lens > window, 0, limits)
    rows: _Integers = np.flatnonzero(limits >= MIN_PAGES)
    if max_members < 2 or not _may_share(block_tables[rows, :1]):
        return table
    rows, limits, common = _sorted_by_pages(block_tables, rows, limits)
    begins, depths = _best_groups(common, len(rows))
    if not len(begins):
        return table

    # Runs of equal ``begins`` are groups, and -1 is none.
    is_member = begins >= 0
    members, pages = rows[is_member], depths[is_member]
    firsts = np.flatnonzero(np.diff(begins[is_member], prepend=-1))
    sizes = np.diff(firsts, append=len(members))
    # The members of a group are divided evenly among as few tiles as possible.
    tiles = -(-sizes // max_members)
    parts = _num_parts(tiles, pages[firsts], B, num_kv_heads)
    table[members, _PAGES] = pages
    table[members, _PARTS] = np.repeat(parts, sizes)
    table[: len(members), _MEMBER] = members

    counts = tiles * parts
    group = np.repeat(np.arange(len(firsts)), counts)
    index = np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
    tile, width = index // parts[group], -(-sizes // tiles)[group]
    items = table[: len(group)]
    items[:, _BEGIN] = firsts[group] + tile * width
    items[:, _END] = np.minimum(items[:, _BEGIN] + width, (firsts + sizes)[group])
    items[:, _PART] = index % parts[group]
    return table


def _may_share(first_pages: _Integers) -> bool:
    """Return whether enough sequences have the same first page; most batches end here."""
    if len(first_pages) < MIN_MEMBERS:
        return False
    ordered = np.sort(first_pages.ravel())
    return bool((ordered[MIN_MEMBERS - 1 :] == ordered[: 1 - MIN_MEMBERS]).any())


def _sorted_by_pages(
    block_tables: _Integers, rows: _Integers, limits: _Integers
) -> tuple[_Integers, _Integers, _Integers]:
    """Sort ``rows`` so that sequences with equal leading pages are neighbors.

    Returns:
        The rows, their limits, and the pages that each row but the first shares with the one before.
    """
    limits = limits[rows]
    width = int(limits.max())
    pages = block_tables[rows, :width]
    pages = np.where(np.arange(width) < limits[:, None], pages, -1)
    # Compared as bytes, the first page decides, then the second.
    keys = np.ascontiguousarray(pages, ">i4").view(f"S{4 * width}").ravel()
    order = np.argsort(keys, kind="stable")
    rows, limits, pages = rows[order], limits[order], pages[order]
    different = pages[1:] != pages[:-1]
    common = np.where(different.any(1), different.argmax(1), width)
    return rows, limits, np.minimum(common, np.minimum(limits[1:], limits[:-1]))


def _best_groups(common: _Integers, count: int) -> tuple[_Integers, _Integers]:
    """Choose the groups that save the most reads of pages, of all that prefixes allow.

    Groups that share more pages are inside groups that share fewer. From the longest prefix to the
    shortest, the groups inside a group are replaced by it if that saves more.

    Returns:
        For each of ``count`` rows the first row of its group, or -1, and the pages that it shares.
    """
    begins, depths = np.full(count, -1), np.zeros(count, np.int32)
    # Pages saved by the groups chosen so far, at the first row of each run.
    saved = np.zeros(count, np.int64)
    for depth in np.unique(common[common >= MIN_PAGES])[::-1]:
        starts = np.flatnonzero(np.concatenate(([True], common < depth)))
        sizes = np.diff(starts, append=count)
        inside = np.add.reduceat(saved, starts)
        whole = np.where(sizes >= MIN_MEMBERS, (sizes - 1) * int(depth), 0)
        replaced = np.repeat(whole > inside, sizes)
        begins = np.where(replaced, np.repeat(starts, sizes), begins)
        depths = np.where(replaced, depth, depths)
        saved[:] = 0
        saved[starts] = np.maximum(whole, inside)
    return begins, depths


def _num_parts(tiles: _Integers, pages: _Integers, B: int, num_kv_heads: int) -> _Integers:
    """Divide the ``pages`` of each group so that the programs that run at once have equal shares.

    There are at most B items.
    """
    items = min(_PROGRAMS // num_kv_heads, B - int(tiles.sum()))
    share = max(_MIN_PART, -(-int((tiles * pages).sum()) // max(items, 1)))
    parts = np.minimum(-(-pages // share), MAX_PARTS)
    if items < 1:
        parts = np.ones_like(parts)
    # Without empty parts at the end.
    return -(-pages // -(-pages // parts))
