"""Sampling of one token a row: temperature, top-k, top-p and min-p, then one draw.

Each row has one program. It does not sort the logits. It writes each logit's distance below the
largest logit once, as the bits of an fp32 number. The distances are not negative, so their bits are
ordered like integers.

Every filter keeps the tokens up to a bound on the distance. The bound of min-p is given. The bound
of top-k is the smallest that keeps k tokens. The bound of top-p is the smallest that keeps the
probability p. Both are found by bisection over integers, in at most 31 passes over a row that stays
in the cache. A bound is a value and not a rank, so ties stay together. The draw is by inverse
transform, with sums in float64 in the order of the tokens.

Distances, counts and the random number equal the reference's bit for bit, so greedy, top-k and
min-p keep the same tokens. Sums of probabilities differ from the reference's by rounding (1e-6
relative). The tokens that top-p keeps and the token drawn are therefore the same, unless ``top_p``
or the random number is that close to a boundary.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
)
from idefics2_kernels.gpu.primitives import LOG2_E

# The bits of the largest distance, that of a logit of -inf.
INF_BITS = tl.constexpr(0x7F800000)
# Pads a row to whole blocks. It is greater than every bound.
BEYOND = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True)
class LaunchConfig:
    """Columns of a block, and the warps that share it."""

    BLOCK_V: int
    num_warps: int


def launch_config(V: int) -> LaunchConfig:
    """Return the block for a vocabulary of ``V``."""
    # On an H100 64 rows take 92 us and one row takes 73 us, so the passes over a row are the limit.
    # Few programs run at once, so each uses as many warps as possible.
    return LaunchConfig(1024, 4) if V <= 1024 else LaunchConfig(8192, 32)


@triton.jit
def philox_uniform(seed, index):
    """Return the first word of Philox4x32-10 for ``seed`` and ``index``, as fp32 in [0, 1)."""
    WORD: tl.constexpr = 0xFFFFFFFF
    key0, key1 = seed.to(tl.uint64) & WORD, (seed >> 32).to(tl.uint64) & WORD
    c0, c1 = index.to(tl.uint64) & WORD, (index >> 32).to(tl.uint64) & WORD
    c2 = c0 & 0
    c3 = c2
    for _ in tl.static_range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (product1 >> 32) ^ c1 ^ key0, (product0 >> 32) ^ c3 ^ key1
        c1, c3 = product1 & WORD, product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return (c0 >> 8).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _measure(bits_row, bound, BLOCKS_END, BLOCK_V: tl.constexpr, HAS_MASS: tl.constexpr):
    """Return the number of tokens up to ``bound`` and the sum of their weights.

    Both never decrease as the bound grows.
    """
    count = tl.zeros([BLOCK_V], dtype=tl.int32)
    mass = tl.zeros([BLOCK_V], dtype=tl.float32)
    for begin in range(0, BLOCKS_END, BLOCK_V):
        bits = tl.load(bits_row + begin + tl.arange(0, BLOCK_V))
        count += (bits <= bound).to(tl.int32)
        if HAS_MASS:
            mass += _weights(bits, bound)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _weights(bits, bound):
    """Return the weights of tokens at distance ``bits``: 1 at distance 0, and 0 past ``bound``."""
    distance = bits.to(tl.float32, bitcast=True)
    return tl.where(bits <= bound, tl.exp2(distance * -LOG2_E), 0.0)


@triton.jit
def _top_k_bound(bits_row, k, bound, BLOCKS_END, BLOCK_V: tl.constexpr):
    """Return the smallest bound that keeps ``k`` tokens, or ``bound`` if that keeps fewer."""
    # The largest bound that keeps too few tokens. ``bound`` is the smallest that keeps enough.
    short = -1
    count, _ = _measure(bits_row, bound, BLOCKS_END, BLOCK_V, HAS_MASS=False)
    while (count > k) & (bound - short > 1):
        middle = short + (bound - short) // 2
        kept, _ = _measure(bits_row, middle, BLOCKS_END, BLOCK_V, HAS_MASS=False)
        enough = kept >= k
        count = tl.where(enough, kept, count)
        bound, short = tl.where(enough, middle, bound), tl.where(enough, short, middle)
    return bound


@triton.jit
def _top_p_bound(bits_row, p, bound, BLOCKS_END, BLOCK_V: tl.constexpr):
    """Return the smallest bound that keeps ``p`` of the weight of the tokens up to ``bound``."""
    short = -1
    count_short = 0
    count, mass = _measure(bits_row, bound, BLOCKS_END, BLOCK_V, HAS_MASS=True)
    wanted = p.to(tl.float64) * mass
    # Stop when one token is left between the bounds, or one value.
    while (count - count_short > 1) & (bound - short > 1):
        middle = short + (bound - short) // 2
        kept, mass = _measure(bits_row, middle, BLOCKS_END, BLOCK_V, HAS_MASS=True)
        enough = mass >= wanted
        count, count_short = tl.where(enough, kept, count), tl.where(enough, count_short, kept)
        bound, short = tl.where(enough, middle, bound), tl.where(enough, short, middle)
    return bound


@triton.jit
def _draw(bits_row, bound, uniform, BLOCKS_END, BLOCK_V: tl.constexpr):
    """Return the first token at which the summed weights exceed ``uniform`` times their total.

    Tokens past ``bound`` have weight 0.
    """
    total = tl.full([], 0.0, dtype=tl.float64)
    for begin in range(0, BLOCKS_END, BLOCK_V):
        weights = _weights(tl.load(bits_row + begin + tl.arange(0, BLOCK_V)), bound)
        total += tl.sum(weights.to(tl.float64), axis=0)
    threshold = uniform.to(tl.float64) * total

    token = tl.full([], -1, dtype=tl.int32)
    before = tl.full([], 0.0, dtype=tl.float64)
    for begin in range(0, BLOCKS_END, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)
        weights = _weights(tl.load(bits_row + offs_v), bound).to(tl.float64)
        # The same order of summation as for the total, so that some block exceeds the threshold.
        after = before + tl.sum(weights, axis=0)
        if (token < 0) & (after > threshold):
            exceeds = (before + tl.cumsum(weights, axis=0) > threshold) & (weights > 0.0)
            first = tl.min(tl.where(exceeds, offs_v, BLOCKS_END), axis=0)
            last = tl.max(tl.where(weights > 0.0, offs_v, 0), axis=0)
            # The scan may round below the block's sum, and then no token exceeds the threshold.
            token = tl.minimum(first, last)
        before = after
    return token


@triton.jit(
    do_not_specialize_on_alignment=[
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "log_min_p_ptr",
        "seed_ptr",
        "index_ptr",
    ]
)
def _sample_kernel(
    logits_ptr,  # (B, V)
    temperature_ptr,  # (B,)
    top_k_ptr,  # (B,)
    top_p_ptr,  # (B,)
    log_min_p_ptr,  # (B,)
    seed_ptr,  # (B,)
    index_ptr,  # (B,)
    bits_ptr,  # (B, BLOCKS_END), scratch: each token's distance below the largest logit
    out_ptr,  # (B,)
    stride_logits,
    V,
    # V rounded up to whole blocks.
    BLOCKS_END,
    MIN_P_FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_logits
    largest = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
    where = tl.zeros([BLOCK_V], dtype=tl.int32)
    for begin in range(0, V, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_row + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        where = tl.where(logits > largest, offs_v, where)
        largest = tl.maximum(logits, largest)
    peak = tl.max(largest, axis=0)
    token = tl.min(tl.where(largest == peak, where, V - 1), axis=0)

    temperature = tl.load(temperature_ptr + row)
    if temperature != 0.0:
        bits_row = bits_ptr + row * BLOCKS_END
        for begin in range(0, V, BLOCK_V):
            offs_v = begin + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_row + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
            distance = tl.div_rn(peak - logits, temperature)
            bits = tl.where(offs_v < V, distance.to(tl.int32, bitcast=True), BEYOND)
            tl.store(bits_row + offs_v, bits)
        # Threads read bits that other threads have written.
        tl.debug_barrier()

        bound = tl.full([], INF_BITS, dtype=tl.int32)
        min_p_bound = tl.abs(tl.load(log_min_p_ptr + row)).to(tl.int32, bitcast=True)
        if MIN_P_FIRST:
            bound = tl.minimum(bound, min_p_bound)
        k = tl.load(top_k_ptr + row)
        if (k > 0) & (k < V):
            bound = _top_k_bound(bits_row, k.to(tl.int32), bound, BLOCKS_END, BLOCK_V)
        p = tl.load(top_p_ptr + row)
        if p < 1.0:
            bound = _top_p_bound(bits_row, p, bound, BLOCKS_END, BLOCK_V)
        if not MIN_P_FIRST:
            bound = tl.minimum(bound, min_p_bound)
        uniform = philox_uniform(tl.load(seed_ptr + row), tl.load(index_ptr + row))
        # Sums in float64 need twice the registers, so the blocks are half as wide.
        drawn = _draw(bits_row, bound, uniform, BLOCKS_END, BLOCK_V // 2)
        token = tl.where(drawn < 0, token, drawn)
    tl.store(out_ptr + row, token.to(tl.int64))


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

    The parameters are (B,) each. ``min_p_first`` applies min-p before top-k and top-p. Otherwise it
    is applied after them. A logit may be -inf but not NaN, and the largest of a row must be finite.
    The last axis of ``logits`` must be contiguous.

    Args:
        logits: Logits (B, V).
        temperature: 0 selects the first of the largest logits.
        top_k: Number of tokens to keep. 0 disables it.
        top_p: Probability to keep, in (0, 1].
        min_p: Share of the largest probability that a token needs, in [0, 1].
        seed: Seed of the row's random stream.
        index: Index of the token in the stream.
        min_p_first: Whether min-p is the first filter, or the last.

    Raises:
        ValueError: A shape, stride or device does not fit, or the vocabulary is empty.
        TypeError: ``logits`` are none of bf16, fp16, fp32, or ``temperature``, ``top_p`` or
            ``min_p`` are not fp32, or ``top_k`` are not integers, or ``seed`` or ``index`` are not
            int64.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, *FLOATS)
    check_rows("logits", logits)
    B, V = logits.shape
    if V == 0:
        raise ValueError(f"logits must have a token to choose, got {tuple(logits.shape)}")
    fractions = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    words = {"seed": seed, "index": index}
    for name, tensor in fractions.items():
        check_shape(name, tensor, (B,))
        check_dtype(name, tensor, torch.float32)
    check_shape("top_k", top_k, (B,))
    check_dtype("top_k", top_k, *INTS)
    for name, tensor in words.items():
        check_shape(name, tensor, (B,))
        check_dtype(name, tensor, torch.int64)
    check_device(logits=logits, top_k=top_k, **fractions, **words)
    out = torch.empty((B,), dtype=torch.int64, device=logits.device)
    if B:
        config = launch_config(V)
        end = triton.cdiv(V, config.BLOCK_V) * config.BLOCK_V
        bits = torch.empty((B, end), dtype=torch.int32, device=logits.device)
        _sample_kernel[(B,)](
            logits,
            temperature.contiguous(),
            top_k.contiguous(),
            top_p.contiguous(),
            # The reference computes this logarithm with PyTorch too, so the bounds are equal.
            min_p.log().contiguous(),
            seed.contiguous(),
            index.contiguous(),
            bits,
            out,
            logits.stride(0),
            V,
            end,
            MIN_P_FIRST=min_p_first,
            **asdict(config),
        )
    return out
