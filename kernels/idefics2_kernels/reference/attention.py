"""Reference of the three attentions, in plain PyTorch.

B packed sequences follow each other along the first axis. ``cu_seqlens`` (B + 1,) int32 holds the
start of each sequence and the end of the last. Sequences of equal length are computed as one batch,
so no score matrix spans two sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from idefics2_kernels.reference.precision import widen


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attend ``q`` (B, S, H, D) to ``k`` and ``v`` (B, T, H_KV, D) where ``visible`` (S, T).

    Each group of H // H_KV query heads shares a key head. The result (B, S, H, D) of a query that
    sees no key is zero.
    """
    B, S, H, D = q.shape
    H_KV = k.shape[2]
    grouped = widen(q).view(B, S, H_KV, H // H_KV, D).permute(0, 2, 3, 1, 4)  # (B, H_KV, G, S, D)
    keys = widen(k).permute(0, 2, 3, 1)[:, :, None]  # (B, H_KV, 1, D, T)
    values = widen(v).permute(0, 2, 1, 3)[:, :, None]  # (B, H_KV, 1, T, D)
    scores = grouped @ keys * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (weights @ values).permute(0, 3, 1, 2, 4).reshape(B, S, H, D).to(q.dtype)


def make_mask(
    S: int, T: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Return which of T keys each of the last S queries sees: (S, T), or ``None`` for all."""
    if not causal and window is None:
        return None
    distance = torch.arange(T - S, T, device=device)[:, None] - torch.arange(T, device=device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def _group_by_length(
    cu_seqlens: Tensor, max_seqlen: int, total: int
) -> list[tuple[int, Tensor | None]]:
    """Group packed sequences by length into (length, indices of its sequences).

    The indices are ``None`` if all sequences have that length. This case does not synchronize with
    the device.
    """
    B = cu_seqlens.shape[0] - 1
    if B * max_seqlen == total:
        return [(max_seqlen, None)]
    lengths = cu_seqlens.diff()
    return [(n, torch.nonzero(lengths == n)[:, 0]) for n in torch.unique(lengths).tolist()]


def _packed_rows(cu_seqlens: Tensor, members: Tensor, length: int) -> Tensor:
    """Return the packed rows of the sequences ``members`` (G,) of one ``length``: (G, length)."""
    return cu_seqlens[members].long()[:, None] + torch.arange(length, device=cu_seqlens.device)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend within packed sequences: ``q`` (T, H, D), ``k`` and ``v`` (T, H_KV, D) -> (T, H, D).

    Query i sees key j of its own sequence if |i - j| < ``window`` and, if ``causal``, j <= i.
    Scores are multiplied by ``scale``, 1 / sqrt(D) by default. Query head h reads key head
    h // (H // H_KV). ``lse`` (H, T), in fp32 or wider, receives the logarithm of each query's sum
    of exponentials.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lse is not None:
        _write_lse(lse, q, k, cu_seqlens, causal, window, scale)
    parts, rows = [], []
    for length, members in _group_by_length(cu_seqlens, max_seqlen, q.shape[0]):
        visible = make_mask(length, length, causal, window, q.device)
        if members is None:
            B = cu_seqlens.shape[0] - 1
            batched = [t.reshape(B, length, *t.shape[1:]) for t in (q, k, v)]
            return _attend(batched[0], batched[1], batched[2], visible, scale).reshape(q.shape)
        rows.append(_packed_rows(cu_seqlens, members, length))
        parts.append(_attend(q[rows[-1]], k[rows[-1]], v[rows[-1]], visible, scale))
    order = torch.cat([r.flatten() for r in rows]).argsort()
    return torch.cat([part.flatten(0, 1) for part in parts])[order]


def _write_lse(
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Write the log-sum-exp of each query's scores within its sequence to ``lse`` (H, T)."""
    groups = q.shape[1] // k.shape[1]
    for begin, end in pairwise(cu_seqlens.tolist()):
        queries = widen(q[begin:end].detach()).transpose(0, 1)
        keys = widen(k[begin:end].detach()).permute(1, 2, 0).repeat_interleave(groups, 0)
        scores = queries @ keys * scale
        visible = make_mask(end - begin, end - begin, causal, window, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        lse[:, begin:end] = scores.logsumexp(-1)


def perceiver_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend the latents ``q`` (N, L, H, D) to their image's patches and to themselves.

    ``k_context`` and ``v_context`` are (P, H_KV, D), packed by ``cu_seqlens`` (N + 1,).
    ``k_latents`` and ``v_latents`` are (N, L, H_KV, D). The result is (N, L, H, D). There is no
    mask: every latent sees all patches and latents of its image.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts, images = [], []
    for length, members in _group_by_length(cu_seqlens, max_seqlen, k_context.shape[0]):
        if members is None:
            k, v = (
                torch.cat([t.reshape(q.shape[0], length, *t.shape[1:]), latents], 1)
                for t, latents in ((k_context, k_latents), (v_context, v_latents))
            )
            return _attend(q, k, v, None, scale)
        rows = _packed_rows(cu_seqlens, members, length)
        k = torch.cat([k_context[rows], k_latents[members]], 1)
        v = torch.cat([v_context[rows], v_latents[members]], 1)
        parts.append(_attend(q[members], k, v, None, scale))
        images.append(members)
    return torch.cat(parts)[torch.cat(images).argsort()]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    shared_prefixes: Tensor | None = None,
) -> Tensor:
    """Attend new queries ``q`` (T, H, D) causally to keys in pages: (T, H, D).

    ``k_cache`` and ``v_cache`` are (pages, H_KV, P, D). Token t of sequence b is in page
    ``block_table[b, t // P]`` at offset t % P. ``block_table`` is (B, pages of a sequence).
    ``context_lens`` (B,) counts the keys of each sequence. The keys of this step's queries are the
    last of them. ``cu_seqlens`` (B + 1,) packs the queries. Entries of ``block_table`` are not read
    after the last page of a sequence, or if all tokens of the page are outside the ``window``.

    ``shared_prefixes`` (B, 6) int32 lists decoding sequences that share leading pages. It changes
    no value here: a kernel may read the shared pages once and sum in another order. Members of a
    group have one query each, the same first pages in ``block_table``, and a ``window`` that covers
    them. The list of members has all members of an item next to each other. The columns of row b:

    0. Leading pages of sequence b that items compute for it, fewer than its pages, or 0.
    1. Parts that these pages are divided into, at most 7, or 0. Each but the last has
       ceil(pages / parts) pages.
    2. The sequence at place b of the list of members.
    3. Item b: the place of its first member. It has at most 64 // (H // H_KV) members.
    4. Item b: the place after its last member. There is no item b if it equals column 3.
    5. Item b: the part that it computes. Each part of each member belongs to one item.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    P = k_cache.shape[2]
    outs = []
    offsets, lengths = cu_seqlens.tolist(), context_lens.tolist()
    for b, T in enumerate(lengths):
        S = offsets[b + 1] - offsets[b]
        if S == 0:
            continue
        # The first page that the window of any query reaches.
        first = 0 if window is None else max(T - S - window + 1, 0) // P
        pages = block_table[b, first : -(-T // P)].long()
        k, v = (
            cache[pages].transpose(1, 2).flatten(0, 1)[None, : T - first * P]
            for cache in (k_cache, v_cache)
        )
        visible = make_mask(S, T - first * P, True, window, q.device)
        outs.append(_attend(q[None, offsets[b] : offsets[b + 1]], k, v, visible, scale)[0])
    return torch.cat(outs) if outs else torch.zeros_like(q)
