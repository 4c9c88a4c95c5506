"""The reference operations against independent formulations of the same mathematics."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from idefics2_kernels import REFERENCE, MissingOperationError, NoGradientError, Ops, ops
from idefics2_kernels.reference import attention, low_rank, operations, sampling

D, H, H_KV = 24, 6, 2


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Compute PyTorch's attention on one sequence, (S, H, D) each."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def mask_of(S: int, T: int, causal: bool, window: int | None) -> Tensor:
    """Return the attention mask (S, T) of the last S of T positions, computed in a loop."""
    mask = torch.zeros(S, T, dtype=torch.bool)
    for i in range(S):
        for j in range(T):
            distance = (i + T - S) - j
            near = window is None or abs(distance) < window
            mask[i, j] = near and (distance >= 0 or not causal)
    return mask


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [3, 1, 9, 3], [4, 0, 2]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention(lengths: list[int], window: int | None, causal: bool) -> None:
    T = sum(lengths)
    qkv = randn(T, H + 2 * H_KV, D)
    # These are views, as in the model
    q, k, v = qkv.split((H, H_KV, H_KV), dim=1)
    got = attention.flash_attention(
        q, k, v, cumulative(lengths), max(lengths), causal=causal, window=window
    )
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        want = sdpa(q[rows], k[rows], v[rows], mask_of(length, length, causal, window))
        torch.testing.assert_close(got[rows], want)
        start += length
    assert start == T == got.shape[0]


def test_flash_attention_scale() -> None:
    q, k, v = randn(5, H, D), randn(5, H_KV, D), randn(5, H_KV, D)
    got = attention.flash_attention(q, k, v, cumulative([5]), 5, causal=False, scale=0.7)
    torch.testing.assert_close(got, sdpa(q, k, v, None, 0.7))


@pytest.mark.parametrize("lengths", [[6], [4, 4], [5, 2, 5, 9], [3, 0]], ids=str)
def test_perceiver_attention(lengths: list[int]) -> None:
    N, L, P = len(lengths), 3, sum(lengths)
    q, k_latents, v_latents = randn(N, L, H, D), randn(N, L, H_KV, D), randn(N, L, H_KV, D)
    k_context, v_context = randn(P, 2, H_KV, D).unbind(1)
    offsets = cumulative(lengths)
    got = attention.perceiver_attention(
        q, k_context, v_context, k_latents, v_latents, offsets, max(lengths)
    )
    for n in range(N):
        rows = slice(int(offsets[n]), int(offsets[n + 1]))
        k = torch.cat([k_context[rows], k_latents[n]])
        v = torch.cat([v_context[rows], v_latents[n]])
        torch.testing.assert_close(got[n], sdpa(q[n], k, v, None))


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("page_size", [4, 64])
def test_paged_attention_reads_only_its_pages(window: int | None, page_size: int) -> None:
    # The sequences are a decode, a prefill, a chunk and a first token
    context, new = [11, 4, 9, 1], [1, 4, 5, 1]
    widest = max(-(-n // page_size) for n in context)
    table = torch.randperm(4 * widest + 5)[: 4 * widest].view(4, widest).int()
    caches = [torch.full((4 * widest + 5, H_KV, page_size, D), math.nan).double() for _ in "kv"]
    keys, values = ([randn(n, H_KV, D) for n in context] for _ in "kv")
    for b, n in enumerate(context):
        in_reach = 0 if window is None else max(n - new[b] - window + 1, 0) // page_size * page_size
        for t in range(in_reach, n):
            page, offset = int(table[b, t // page_size]), t % page_size
            caches[0][page, :, offset], caches[1][page, :, offset] = keys[b][t], values[b][t]
        # These entries must not be read
        table[b, -(-n // page_size) :] = 10**6
        table[b, : in_reach // page_size] = 10**6
    q = randn(sum(new), H, D)
    got = attention.paged_attention(
        q,
        caches[0],
        caches[1],
        table,
        torch.tensor(context).int(),
        cumulative(new),
        max(new),
        window=window,
    )
    start = 0
    for b, (n, s) in enumerate(zip(context, new, strict=True)):
        want = sdpa(q[start : start + s], keys[b], values[b], mask_of(s, n, True, window))
        torch.testing.assert_close(got[start : start + s], want)
        start += s


def rotary_inputs(T: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angles = torch.outer(torch.arange(50).double(), 10.0 ** -torch.arange(0, 1, 2 / D).double())
    positions = torch.randint(0, 50, (T,))
    return randn(T, H, D), randn(T, H_KV, D), positions, torch.cat([angles.cos(), angles.sin()], -1)


def test_rotary() -> None:
    q, k, positions, table = rotary_inputs()
    cos, sin = (t[positions].repeat(1, 2)[None] for t in table.chunk(2, -1))
    want = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for got, expected in zip(operations.rotary(q, k, positions, table), want, strict=True):
        torch.testing.assert_close(got, expected[0].transpose(0, 1))


def test_rotary_and_cache_writes_only_its_slots() -> None:
    q, k, positions, table = rotary_inputs()
    v = randn(7, H_KV, D)
    caches = [torch.full((5, H_KV, 4, D), math.nan).double() for _ in "kv"]
    slots = torch.tensor([3, 19, 0, -1, 7, 8, -1])
    rotated, keys = operations.rotary(q, k, positions, table)
    got = operations.rotary_and_cache(q, k, v, positions, table, caches[0], caches[1], slots)
    assert torch.equal(got, rotated)
    for cache, tensor in zip(caches, (keys, v), strict=True):
        # In this shape the first axis is the slot
        flat = cache.transpose(1, 2).flatten(0, 1)
        kept = slots >= 0
        assert torch.equal(flat[slots[kept]], tensor[kept])
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[slots[kept]] = False
        assert flat[untouched].isnan().all()


def test_norms_and_activations() -> None:
    x, residual, weight, bias = randn(5, 3, 40), randn(5, 3, 40), randn(40), randn(40)
    rms = functional.rms_norm(x, (40,), weight, 1e-3)
    torch.testing.assert_close(operations.rms_norm(x, weight, 1e-3), rms)
    layer = functional.layer_norm(x, (40,), weight, bias, 1e-3)
    torch.testing.assert_close(operations.layer_norm(x, weight, bias, 1e-3), layer)
    total = x + residual
    normed, summed = operations.add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(summed, total)
    torch.testing.assert_close(normed, functional.rms_norm(total, (40,), weight, 1e-3))
    normed, summed = operations.add_layer_norm(x, residual, weight, bias, 1e-3)
    assert torch.equal(summed, total)
    torch.testing.assert_close(normed, functional.layer_norm(total, (40,), weight, bias, 1e-3))
    gate, up = x[..., :20], x[..., 20:]
    torch.testing.assert_close(operations.silu_mul(x), gate / (1 + (-gate).exp()) * up)
    inner = math.sqrt(2 / math.pi) * ((x + bias) + 0.044715 * (x + bias) ** 3)
    torch.testing.assert_close(operations.gelu_tanh(x, bias), 0.5 * (x + bias) * (1 + inner.tanh()))
    assert torch.equal(operations.gelu_tanh(x), operations.gelu_tanh(x, torch.zeros(40).double()))


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = torch.randn(64, 40).bfloat16(), torch.randn(40).bfloat16()
    rounded = functional.rms_norm(x.float(), (40,), None, 1e-5).bfloat16()
    assert torch.equal(operations.rms_norm(x, weight, 1e-5), rounded * weight)


def test_patches() -> None:
    size, grids = 3, [(2, 4), (1, 1), (5, 2)]
    tiles = [
        torch.randint(0, 256, (rows * size, columns * size, 3), dtype=torch.uint8)
        for rows, columns in grids
    ]
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    got = operations.patches(
        torch.cat([tile.flatten() for tile in tiles]),
        cumulative([rows * columns for rows, columns in grids]),
        torch.tensor([columns for _, columns in grids]),
        size,
        1 / 255,
        mean,
        std,
        torch.float64,
    )
    want = []
    for tile, (rows, columns) in zip(tiles, grids, strict=True):
        for r in range(rows):
            for c in range(columns):
                patch = tile[r * size : (r + 1) * size, c * size : (c + 1) * size].double() / 255
                patch = (patch - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(
                    std, dtype=torch.float64
                )
                want.append(patch.permute(2, 0, 1).flatten())
    torch.testing.assert_close(got, torch.stack(want))


def philox(seed: int, index: int) -> int:
    """Return the first word of Philox4x32-10, computed in plain integers."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    c = [index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF, 0, 0]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            high >> 32 ^ c[1] ^ key[0],
            high & 0xFFFFFFFF,
            low >> 32 ^ c[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_random_stream() -> None:
    # This is the generator's published test vector
    assert philox(0, 0) == 0x6627E8D5
    seeds = torch.randint(-(2**63), 2**63 - 1, (200,))
    index = torch.randint(0, 2**40, (200,))
    want = [
        (philox(s % 2**64, i) >> 8) / 2**24
        for s, i in zip(seeds.tolist(), index.tolist(), strict=True)
    ]
    assert sampling.philox_uniform(seeds, index).tolist() == want


def sample(logits: Tensor, n: int, **options: Any) -> Tensor:
    """Draw ``n`` tokens from one row of ``logits`` (V,)."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), options.pop(name, default), dtype=dtype)

    columns = (
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        column("seed", 5, torch.int64),
    )
    return sampling.sample(logits.expand(n, -1), *columns, torch.arange(n), **options)


FILTERS: list[dict[str, float]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sample_has_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    logits = 2 * torch.randn(40)
    scores = logits[None]
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    want = scores[0].double().softmax(-1)
    draws = 200_000
    counts = torch.zeros(40)
    for start in range(0, draws, 20_000):
        tokens = sample(logits, 20_000, seed=start, min_p_first=False, **options)
        counts += tokens.bincount(minlength=40)
    assert not counts[want == 0].any()
    kept = want > 0
    chi_square = ((counts[kept] - draws * want[kept]) ** 2 / (draws * want[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_min_p_first_changes_the_result() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)
    kept = {
        order: set(sample(logits, 4000, min_p=0.3, top_p=0.85, min_p_first=order).tolist())
        for order in (True, False)
    }
    # If min-p is first, two tokens survive, and the first has 73 % of their sum. If top-p is first,
    # the first has 64 % and the first two 88 %.
    assert kept == {True: {0, 1}, False: {0, 1}}
    kept = {
        order: set(sample(logits, 4000, min_p=0.3, top_p=0.7, min_p_first=order).tolist())
        for order in (True, False)
    }
    assert kept == {True: {0}, False: {0, 1}}


def test_ties_are_kept_together_and_barred_tokens_are_not_drawn() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, -math.inf, 0.0])
    assert set(sample(logits, 3000, top_k=1).tolist()) == {0, 1, 2}
    assert set(sample(logits, 3000, top_p=0.01).tolist()) == {0, 1, 2}
    assert set(sample(logits, 3000).tolist()) == {0, 1, 2, 4}
    assert set(sample(logits, 10, temperature=0.0).tolist()) == {0}
    assert set(sample(torch.tensor([3.0, 1e4, 9e3]), 10, temperature=1e-30).tolist()) == {1}


def test_each_row_has_its_own_parameters() -> None:
    logits = torch.randn(3, 50)
    ones, zeros = torch.ones(3), torch.zeros(3)
    greedy = sampling.sample(
        logits,
        torch.tensor([0.0, 1.0, 1.0]),
        torch.tensor([0, 1, 0]),
        ones,
        zeros,
        zeros.long(),
        zeros.long(),
    )
    assert greedy[:2].tolist() == logits[:2].argmax(-1).tolist()


def test_equal_lengths_read_nothing_back_from_the_device() -> None:
    """Meta tensors hold no values, so any read of one fails."""
    with torch.device("meta"):
        q, k = torch.empty(12, H, D), torch.empty(12, H_KV, D)
        offsets = torch.empty(4, dtype=torch.int32)
        out = attention.flash_attention(q, k, k, offsets, 4, causal=True, window=2)
        assert out.shape == q.shape
        latents, keys = torch.empty(3, 2, H, D), torch.empty(3, 2, H_KV, D)
        assert (
            attention.perceiver_attention(latents, k, k, keys, keys, offsets, 4).shape
            == latents.shape
        )


FLOAT64_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: operations.linear(x, x),
    "linear_gelu": lambda x: operations.linear_gelu(x, x),
    "lora_linear": lambda x: low_rank.lora_linear(x, x, x, x, 0.5),
    "rms_norm": lambda x: operations.rms_norm(x, x[0], 1e-5),
    "add_rms_norm": lambda x: operations.add_rms_norm(x, x, x[0], 1e-5)[0],
    "layer_norm": lambda x: operations.layer_norm(x, x[0], x[1], 1e-5),
    "add_layer_norm": lambda x: operations.add_layer_norm(x, x, x[0], x[1], 1e-5)[0],
    "silu_mul": operations.silu_mul,
    "gelu_tanh": lambda x: operations.gelu_tanh(x, x[0]),
    "rotary": lambda x: operations.rotary(x[:, None], x[:, None], torch.arange(8), x)[0],
    "rotary_and_cache": lambda x: operations.rotary_and_cache(
        *(x[:, None],) * 3, torch.arange(8), x, *(x.new_zeros(2, 1, 4, 8),) * 2, torch.arange(8)
    ),
    "flash_attention": lambda x: attention.flash_attention(
        *(x[:, None],) * 3, cumulative([8]), 8, causal=True
    ),
    "paged_attention": lambda x: attention.paged_attention(
        x[:, None],
        x.view(2, 1, 4, 8),
        x.view(2, 1, 4, 8),
        torch.tensor([[0, 1]]),
        torch.tensor([8]),
        cumulative([8]),
        8,
    ),
    "perceiver_attention": lambda x: attention.perceiver_attention(
        x[None, :, None], *(x[:, None],) * 2, *(x[None, :, None],) * 2, cumulative([8]), 8
    ),
    "patches": lambda x: operations.patches(
        torch.arange(12, dtype=torch.uint8), cumulative([4]), torch.tensor([2]), 1, 1 / 255, (0.5,) * 3, (0.3,) * 3, x.dtype
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT64_CALLS)
def test_float64_is_not_rounded(name: str) -> None:
    x = randn(8, 8)
    exact, single = FLOAT64_CALLS[name](x), FLOAT64_CALLS[name](x.float())
    assert exact.dtype is torch.float64
    assert single.dtype is torch.float32
    assert not torch.equal(exact, exact.float().double()), "rounded to fp32 on the way"
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)


def test_every_operation_is_tested() -> None:
    names = {field.name for field in dataclasses.fields(Ops)}
    # These are tested in test_nf4
    nf4 = {"nf4_quantize", "nf4_dequantize", "nf4_matmul"}
    assert names == {*FLOAT64_CALLS, "apply_bitmask", "sample", *nf4}


def test_kernels_refuse_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ops.triton_kernels()) == {field.name for field in dataclasses.fields(Ops)}
    got: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        got.append((args, kwargs))
        return torch.zeros(1)

    names = [field.name for field in dataclasses.fields(Ops)]
    monkeypatch.setattr(ops, "triton_kernels", lambda: dict.fromkeys(names, kernel))
    triton, leaf, plain = ops.make_triton_ops(), torch.ones(2, requires_grad=True), torch.ones(2)
    for name in names:
        call = getattr(triton, name)
        for args, kwargs in (((leaf,), {}), ((plain, leaf * 2), {}), ((plain,), {"bias": leaf})):
            with pytest.raises(NoGradientError, match=f"TRITON's '{name}' has no gradient, got"):
                call(*args, **kwargs)
            assert not got
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert call(*args, **kwargs) is not None
                assert got.pop() == (args, kwargs)
        call(plain, plain, scale=None)
        assert got.pop() == ((plain, plain), {"scale": None})


def test_operation_without_a_kernel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    # This simulates a machine without Triton
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    absent = ops.make_triton_ops()
    for field in dataclasses.fields(Ops):
        with pytest.raises(MissingOperationError, match=f"TRITON has no '{field.name}' here"):
            getattr(absent, field.name)(torch.zeros(1))
    replaced = dataclasses.replace(absent, rms_norm=REFERENCE.rms_norm)
    assert replaced.rms_norm is operations.rms_norm
