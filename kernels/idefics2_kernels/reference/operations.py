"""What every operation must compute, in plain PyTorch: the specification; imports no Triton.

Runs on any device and under autograd. Arithmetic is in fp32, or in the input's own dtype if that is wider:
float64 in, float64 through. Results are rounded to the input dtype once, where the model rounds.

Packed sequences: B sequences lie end to end along the first axis; ``cu_seqlens`` (B + 1,) int32 says where each
begins and the last ends. Sequences of equal length are computed together, so that no score matrix spans two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` (..., K) by ``weight`` (N, K) transposed and add ``bias`` (N,): (..., N)."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh form of GELU of ``linear``, which is rounded before: (..., N)."""
    return gelu_tanh(linear(x, weight, bias))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide ``x`` (..., N) by its root mean square, round, and scale by ``weight`` (N,)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N); return the sum's ``rms_norm`` and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise ``x`` (..., N) to mean 0 and variance 1, scale by ``weight`` (N,), add ``bias`` (N,)."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to ``residual`` (..., N); return the sum's ``layer_norm`` and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """Split ``gate_up`` (..., 2F) in halves and return silu(gate) * up (..., F), rounded once."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh form of GELU of ``x`` (..., N) + ``bias`` (N,)."""
    wide = _wide(x)
    if bias is not None:
        wide = wide + bias
    return torch.nn.functional.gelu(wide, approximate="tanh").to(x.dtype)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` (T, H, D) and ``k`` (T, H_KV, D) by their ``positions`` (T,).

    ``cos_sin`` (positions, D) holds D/2 cosines, then D/2 sines; column d pairs with d + D/2, as in Llama.
    """
    cos, sin = (t[:, None, :] for t in _wide(cos_sin)[positions].chunk(2, dim=-1))

    def rotate(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    return rotate(q), rotate(k)


def rotary_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate ``q`` and ``k`` as ``rotary`` does; write ``k`` and ``v`` (T, H_KV, D) into the cache; return ``q``.

    ``k_cache`` and ``v_cache`` (pages, H_KV, P, D) are written in place at ``slots`` (T,) = page * P + offset.
    A negative slot is padding: nothing is written for it.
    """
    q, k = rotary(q, k, positions, cos_sin)
    kept = slots >= 0
    page_size = k_cache.shape[2]
    pages, offsets = slots[kept] // page_size, slots[kept] % page_size
    k_cache[pages, :, offsets] = k[kept].to(k_cache.dtype)
    v_cache[pages, :, offsets] = v[kept].to(v_cache.dtype)
    return q


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attend ``q`` (B, S, H, D) to ``k`` and ``v`` (B, T, H_KV, D) where ``visible`` (S, T); grouped heads.

    A query that sees no key gives zeros.
    """
    B, S, H, D = q.shape
    H_KV = k.shape[2]
    grouped = _wide(q).view(B, S, H_KV, H // H_KV, D).permute(0, 2, 3, 1, 4)  # (B, H_KV, G, S, D)
    keys = _wide(k).permute(0, 2, 3, 1)[:, :, None]  # (B, H_KV, 1, D, T)
    values = _wide(v).permute(0, 2, 1, 3)[:, :, None]  # (B, H_KV, 1, T, D)
    scores = grouped @ keys * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (weights @ values).permute(0, 3, 1, 2, 4).reshape(B, S, H, D).to(q.dtype)


def _visible(
    S: int, T: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Say which of T keys each of the last S queries sees: (S, T), or ``None`` for all of them."""
    if not causal and window is None:
        return None
    distance = torch.arange(T - S, T, device=device)[:, None] - torch.arange(T, device=device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def _groups(cu_seqlens: Tensor, max_seqlen: int, total: int) -> list[tuple[int, Tensor | None]]:
    """Group packed sequences by length: (length, their indices), ``None`` where all have that length.

    The equal case reads nothing back from the device.
    """
    B = cu_seqlens.shape[0] - 1
    if B * max_seqlen == total:
        return [(max_seqlen, None)]
    lengths = cu_seqlens.diff()
    return [(n, torch.nonzero(lengths == n)[:, 0]) for n in torch.unique(lengths).tolist()]


def _rows(cu_seqlens: Tensor, members: Tensor, length: int) -> Tensor:
    """Give the packed rows of the ``members`` (G,), all of one ``length``: (G, length)."""
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
) -> Tensor:
    """Attention within packed sequences: ``q`` (T, H, D), ``k`` and ``v`` (T, H_KV, D) -> (T, H, D).

    Query i sees key j of its own sequence when |i - j| < ``window`` and, if ``causal``, j <= i. Scores are
    multiplied by ``scale``, 1/sqrt(D) unless given. Query head h reads key head h // (H // H_KV).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts, rows = [], []
    for length, members in _groups(cu_seqlens, max_seqlen, q.shape[0]):
        visible = _visible(length, length, causal, window, q.device)
        if members is None:
            B = cu_seqlens.shape[0] - 1
            batched = [t.reshape(B, length, *t.shape[1:]) for t in (q, k, v)]
            return _attend(batched[0], batched[1], batched[2], visible, scale).reshape(q.shape)
        rows.append(_rows(cu_seqlens, members, length))
        parts.append(_attend(q[rows[-1]], k[rows[-1]], v[rows[-1]], visible, scale))
    order = torch.cat([r.flatten() for r in rows]).argsort()
    return torch.cat([part.flatten(0, 1) for part in parts])[order]


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
    """Attention of latents to their image's patches and to themselves.

    ``q`` (N, L, H, D); ``k_context`` and ``v_context`` (P, H_KV, D) packed by ``cu_seqlens`` (N + 1,);
    ``k_latents`` and ``v_latents`` (N, L, H_KV, D) -> (N, L, H, D). No mask: every latent sees every key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts, images = [], []
    for length, members in _groups(cu_seqlens, max_seqlen, k_context.shape[0]):
        if members is None:
            k, v = (
                torch.cat([t.reshape(q.shape[0], length, *t.shape[1:]), latents], 1)
                for t, latents in ((k_context, k_latents), (v_context, v_latents))
            )
            return _attend(q, k, v, None, scale)
        rows = _rows(cu_seqlens, members, length)
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
) -> Tensor:
    """Causal attention of new queries ``q`` (T, H, D) to keys in pages -> (T, H, D).

    ``k_cache`` and ``v_cache`` (pages, H_KV, P, D); sequence b's token t lies in page ``block_table[b, t // P]``
    (B, pages) at offset t % P; ``context_lens`` (B,) counts its keys, those of this step's queries last.
    ``cu_seqlens`` (B + 1,) packs the queries. Entries of ``block_table`` past the last page in reach, and those
    wholly behind the ``window``, are never read.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    P = k_cache.shape[2]
    outs = []
    offsets, lengths = cu_seqlens.tolist(), context_lens.tolist()
    for b, T in enumerate(lengths):
        S = offsets[b + 1] - offsets[b]
        if S == 0:
            continue
        first = 0 if window is None else max(T - S - window + 1, 0) // P  # first page in reach
        pages = block_table[b, first : -(-T // P)].long()
        k, v = (
            cache[pages].transpose(1, 2).flatten(0, 1)[None, : T - first * P]
            for cache in (k_cache, v_cache)
        )
        visible = _visible(S, T - first * P, True, window, q.device)
        outs.append(_attend(q[None, offsets[b] : offsets[b + 1]], k, v, visible, scale)[0])
    return torch.cat(outs) if outs else torch.zeros_like(q)


def patches(
    pixels: Tensor,
    cu_seqlens: Tensor,
    widths: Tensor,
    patch_size: int,
    rescale_factor: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Turn packed uint8 tiles into normalised patch rows (P, C * patch_size**2) in ``dtype``.

    ``pixels`` (P * patch_size**2 * C,): each tile's rows of pixels, channels last, cropped to whole patches.
    ``cu_seqlens`` (N + 1,) counts patches, ``widths`` (N,) is each tile's number of patches in a row. A value is
    (pixel * rescale_factor - mean[c]) / std[c] for each of C channels; a row is channel, row, column.
    """
    C, s = len(mean), patch_size
    wide = torch.promote_types(dtype, torch.float32)
    centre, spread = (
        torch.tensor(t, dtype=wide, device=pixels.device)[:, None] for t in (mean, std)
    )
    rows = []
    offsets = cu_seqlens.tolist()
    for begin, end, width in zip(offsets[:-1], offsets[1:], widths.tolist(), strict=True):
        if begin == end:
            continue
        tile = pixels[begin * s * s * C : end * s * s * C].view(-1, s, width, s, C)
        rows.append(tile.permute(0, 2, 4, 1, 3).reshape(end - begin, C, s * s))
    if not rows:
        return torch.zeros((0, C * s * s), dtype=dtype, device=pixels.device)
    values = (torch.cat(rows).to(wide) * rescale_factor - centre) / spread
    return values.flatten(1).to(dtype)


def philox_uniform(seed: Tensor, index: Tensor) -> Tensor:
    """Draw one fp32 number in [0, 1) for each ``seed`` (B,) int64 and ``index`` (B,) int64.

    The first word of Philox4x32-10 (Salmon et al., 2011) with key ``seed`` and counter (index, 0, 0, 0), its upper
    24 bits: the same stream on every device and for every batching.
    """
    mask = 0xFFFFFFFF
    key0, key1 = seed & mask, (seed >> 32) & mask
    c0, c1 = index & mask, (index >> 32) & mask
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply32(c0, 0xD2511F53)
        high1, low1 = _multiply32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return (c0 >> 8).to(torch.float32) * 2.0**-24


def _multiply32(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Multiply 32-bit values held in int64 by a 32-bit ``constant``: high and low words."""
    low = x * (constant & 0xFFFF)  # each partial product fits 48 bits
    high = x * (constant >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & 0xFFFFFFFF, total & 0xFFFFFFFF


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    index: Tensor,
    *,
    min_p_first: bool = True,
) -> Tensor:
    """Draw one token a row from ``logits`` (B, V): (B,) int64.

    Per row (B,): ``temperature`` (0 takes the first largest logit), ``top_k`` (0 is off), ``top_p`` in (0, 1],
    ``min_p`` in [0, 1], and the random stream's ``seed`` and token ``index``. After the temperature, top-k keeps the
    k largest logits; top-p the tokens with less than ``top_p`` of the remaining probability strictly above them;
    min-p those with at least ``min_p`` times the largest probability. Ties at a boundary stay together.
    ``min_p_first`` applies min-p before the other two (vLLM's order), else after (transformers').
    """
    V = logits.shape[-1]
    greedy = temperature == 0
    wide = _wide(logits)
    # the largest at zero: no temperature, however low, makes it overflow
    scores = (wide - wide.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)[:, None]
    if min_p_first:
        scores = _keep_min_p(scores, min_p)
    descending = scores.sort(-1, descending=True).values
    rank = torch.where((top_k > 0) & (top_k < V), top_k, V).long()[:, None] - 1
    descending = descending.masked_fill(descending < descending.gather(-1, rank), float("-inf"))
    scores = scores.masked_fill(scores < _least_of_top_p(descending, top_p), float("-inf"))
    if not min_p_first:
        scores = _keep_min_p(scores, min_p)
    weights = scores.softmax(-1).double()
    cumulative = weights.cumsum(-1)
    threshold = philox_uniform(seed, index)[:, None] * cumulative[:, -1:]
    # a parallel sum may wobble over tokens of no weight: those are never drawn
    drawn = ((cumulative > threshold) & (weights > 0)).int().argmax(-1)
    return torch.where(greedy, logits.argmax(-1), drawn)


def _keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    floor = scores.amax(-1, keepdim=True) + min_p.log()[:, None]
    return scores.masked_fill(scores < floor, float("-inf"))


def _least_of_top_p(descending: Tensor, top_p: Tensor) -> Tensor:
    """Return the last of sorted scores (B, V) that top-p (B,) keeps; some may be -inf already: (B, 1)."""
    above = descending.softmax(-1).cumsum(-1).roll(1, -1)
    above[:, 0] = 0.0  # probability before each rank
    kept = (above < top_p[:, None]) | (top_p >= 1)[:, None]
    kept &= descending > float("-inf")
    return descending.gather(-1, kept.sum(-1, keepdim=True).clamp_min(1) - 1)
