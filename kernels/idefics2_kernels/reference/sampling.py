"""Reference of ``apply_bitmask`` and ``sample`` in plain PyTorch.

``sample`` filters the logits, then draws by Philox.
"""

import torch
from torch import Tensor

from idefics2_kernels.reference.precision import widen


def apply_bitmask(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Add -inf to the logits (B, V) of the tokens whose bit is 0, in place.

    Row ``rows[r]`` has the bits ``bits[r]``, of ``bits`` (R, W) int32 with W = ceil(V / 32). Token v
    is bit v % 32 of word v // 32, bit 0 being the lowest. A logit that is NaN stays NaN, and one
    that is infinite becomes NaN.
    """
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    is_allowed = (bits[:, :, None] >> places & 1).flatten(1)[:, : logits.shape[1]] == 1
    chosen = logits[rows]
    logits[rows] = torch.where(is_allowed, chosen, chosen + float("-inf"))


def philox_uniform(seed: Tensor, index: Tensor) -> Tensor:
    """Draw one fp32 number in [0, 1) for each ``seed`` (B,) int64 and ``index`` (B,) int64.

    The number is the upper 24 bits of the first word of Philox4x32-10 (Salmon et al., 2011), with
    key ``seed`` and counter (index, 0, 0, 0). The stream is the same on every device and in every
    batch.
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
    """Multiply 32-bit values held in int64 by a 32-bit ``constant``; return high and low words."""
    # Each partial product fits into 48 bits.
    low = x * (constant & 0xFFFF)
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

    The parameters are (B,) each. The filters apply to the logits divided by the temperature:

    - ``temperature``: 0 selects the first of the largest logits.
    - ``top_k``: keeps the k largest logits. 0 disables it.
    - ``top_p`` in (0, 1]: keeps the tokens with less than ``top_p`` of the remaining probability
      strictly above them.
    - ``min_p`` in [0, 1]: keeps the tokens with at least ``min_p`` times the largest probability.
    - ``seed`` and ``index``: the random stream, and the token's index in it.

    Ties at a boundary stay together. ``min_p_first`` applies min-p before the other two filters
    (the order of vLLM). Otherwise it is applied after them (the order of transformers).
    """
    greedy = temperature == 0
    scores = filter_scores(widen(logits), temperature, top_k, top_p, min_p, min_p_first)
    weights = scores.softmax(-1).double()
    cumulative = weights.cumsum(-1)
    threshold = philox_uniform(seed, index)[:, None] * cumulative[:, -1:]
    # Rounding in a parallel sum may raise the total at tokens of zero weight. Exclude those.
    drawn = ((cumulative > threshold) & (weights > 0)).int().argmax(-1)
    return torch.where(greedy, logits.argmax(-1), drawn)


def filter_scores(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    min_p_first: bool,
) -> Tensor:
    """Divide ``logits`` (B, V) by the temperature, and set filtered tokens to -inf: (B, V).

    The arguments are as in ``sample``. The largest score of a row is 0.
    """
    V = logits.shape[-1]
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
    # The largest score is moved to zero first, so that a low temperature cannot overflow it.
    scores = (logits - logits.amax(-1, keepdim=True)) / divisor
    if min_p_first:
        scores = _keep_min_p(scores, min_p)
    descending = scores.sort(-1, descending=True).values
    rank = torch.where((top_k > 0) & (top_k < V), top_k, V).long()[:, None] - 1
    descending = descending.masked_fill(descending < descending.gather(-1, rank), float("-inf"))
    scores = scores.masked_fill(scores < _top_p_threshold(descending, top_p), float("-inf"))
    if not min_p_first:
        scores = _keep_min_p(scores, min_p)
    return scores


def _keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Set scores (B, V) with less than ``min_p`` (B,) of the largest probability to -inf."""
    floor = scores.amax(-1, keepdim=True) + min_p.log()[:, None]
    return scores.masked_fill(scores < floor, float("-inf"))


def _top_p_threshold(descending: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest of ``descending`` scores (B, V) that ``top_p`` (B,) keeps: (B, 1).

    Some scores may be -inf already.
    """
    # The probability of all tokens before each rank.
    above = descending.softmax(-1).cumsum(-1).roll(1, -1)
    above[:, 0] = 0.0
    kept = (above < top_p[:, None]) | (top_p >= 1)[:, None]
    kept &= descending > float("-inf")
    return descending.gather(-1, kept.sum(-1, keepdim=True).clamp_min(1) - 1)
