"""Attention kernels apart from parity: errors, exact sums, shared keys, huge tensors."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from idefics2_engine.scheduling.shared_prefixes import find_shared_prefixes
from idefics2_kernels.attention import decode_attention as decode_module
from idefics2_kernels.attention import perceiver_attention as perceiver_module
from idefics2_kernels.attention.flash_attention import flash_attention
from idefics2_kernels.attention.paged_attention import paged_attention
from idefics2_kernels.attention.perceiver_attention import perceiver_attention
from idefics2_kernels.attention.tiles import head_parts
from idefics2_kernels.catalog import CATALOG, Case
from idefics2_kernels.catalog.flash_attention import flash_attention_rows
from idefics2_kernels.gpu.target import alignment
from idefics2_kernels.gpu.tile_counters import get_counters
from idefics2_kernels.reference import attention as reference

Call = dict[str, Any]
Change = Callable[[Call], Any]


def cumulative(device: torch.device, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def flash_call(device: torch.device) -> Call:
    q, k, v = torch.randn(6, 8, 16, device=device).split((4, 2, 2), 1)
    cu_seqlens = cumulative(device, 4, 2)
    return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": 4, "causal": True}


@pytest.mark.parametrize("D", [16, 72, 128])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_flash_attention_writes_the_log_sum_exp(
    D: int, causal: bool, window: int | None, device: torch.device
) -> None:
    q, k, v = torch.randn(51, 8, D, device=device).split((4, 2, 2), 1)
    packed = (cumulative(device, 40, 0, 1, 10), 40)
    options: dict[str, Any] = {"causal": causal, "window": window}
    lse = torch.full((4, 51), float("nan"), device=device)
    out = flash_attention(q, k, v, *packed, **options, lse=lse)
    wanted = torch.empty_like(lse, dtype=torch.float64)
    reference.flash_attention(q.double(), k.double(), v.double(), *packed, **options, lse=wanted)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(out, flash_attention(q, k, v, *packed, **options, plain=True))


def test_log_sum_exp_of_another_form_is_refused(device: torch.device) -> None:
    call = flash_call(device)
    with pytest.raises(ValueError, match="lse"):
        flash_attention(**call, lse=torch.empty(6, 4, device=device))
    with pytest.raises(ValueError, match="lse must be contiguous"):
        flash_attention(**call, lse=torch.empty(6, 4, device=device).t())
    with pytest.raises(TypeError, match="lse"):
        flash_attention(**call, lse=torch.empty(4, 6, device=device, dtype=torch.float64))


def paged_call(device: torch.device) -> Call:
    k_cache, v_cache = torch.randn(2, 3, 2, 16, 16, device=device)
    return {
        "q": torch.randn(6, 4, 16, device=device),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=device),
        "context_lens": torch.tensor([20, 2], dtype=torch.int32, device=device),
        "cu_seqlens": cumulative(device, 4, 2),
        "max_seqlen": 4,
    }


def perceiver_call(device: torch.device) -> Call:
    k_context, v_context = torch.randn(2, 6, 2, 16, device=device)
    k_latents, v_latents = torch.randn(2, 2, 3, 2, 16, device=device)
    return {
        "q": torch.randn(2, 3, 4, 16, device=device),
        "k_context": k_context,
        "v_context": v_context,
        "k_latents": k_latents,
        "v_latents": v_latents,
        "cu_seqlens": cumulative(device, 4, 2),
        "max_seqlen": 4,
    }


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[torch.device], Call]]] = {
    "flash": (flash_attention, flash_call),
    "paged": (paged_attention, paged_call),
    "perceiver": (perceiver_attention, perceiver_call),
}


def spread(x: Tensor) -> Tensor:
    """Return the same values with gaps along the last axis."""
    return x.repeat_interleave(2, -1)[..., ::2]


def table(call: Call) -> Tensor:
    """Return a table of shared prefixes that shares nothing."""
    lens: Tensor = call["context_lens"]
    return lens.new_zeros(lens.shape[0], 6)


BAD_VALUES: list[tuple[str, str, Change, str]] = [
    ("flash", "q", lambda c: c["q"][0], "q must have shape"),
    ("flash", "k", lambda c: c["k"][1:], "k must have shape"),
    ("flash", "k", lambda c: c["k"][..., 1:], "k must have shape"),
    ("flash", "v", lambda c: c["v"][:, :1], "v must have shape"),
    ("flash", "q", lambda c: c["q"][:, :3], "q must have a multiple of the 2 key heads, got 3"),
    ("flash", "q", lambda c: spread(c["q"]), "q must have a contiguous last axis"),
    ("flash", "v", lambda c: spread(c["v"]), "v must have a contiguous last axis"),
    ("flash", "cu_seqlens", lambda c: c["cu_seqlens"][None], "cu_seqlens must have shape"),
    ("flash", "window", lambda _: 0, "window must be at least 1, got 0"),
    ("flash", "scale", lambda _: 0.0, "scale must be positive, got 0.0"),
    ("flash", "k", lambda c: c["k"].to("meta"), "k must be on .*, got meta"),
    ("paged", "q", lambda c: c["q"][0], "q must have shape"),
    ("paged", "k_cache", lambda c: c["k_cache"][0], "k_cache must have shape"),
    ("paged", "v_cache", lambda c: c["v_cache"][1:], "v_cache must have shape"),
    ("paged", "q", lambda c: c["q"][:, :3], "q must have a multiple of the 2 key heads, got 3"),
    ("paged", "q", lambda c: spread(c["q"]), "q must have a contiguous last axis"),
    ("paged", "block_table", lambda c: c["block_table"][:1], "block_table must have shape"),
    ("paged", "block_table", lambda c: c["block_table"].t(), "block_table must have a contiguous"),
    ("paged", "context_lens", lambda c: c["context_lens"][None], "context_lens must have shape"),
    ("paged", "cu_seqlens", lambda c: c["cu_seqlens"][1:], "cu_seqlens must have shape"),
    ("paged", "window", lambda _: 0, "window must be at least 1, got 0"),
    ("paged", "scale", lambda _: -1.0, "scale must be positive, got -1.0"),
    ("paged", "block_table", lambda c: c["block_table"].to("meta"), "block_table must be on"),
    ("paged", "shared_prefixes", lambda c: table(c)[:1], "shared_prefixes must have shape"),
    ("paged", "shared_prefixes", lambda c: table(c)[:, :5], "shared_prefixes must have shape"),
    ("paged", "shared_prefixes", lambda c: spread(table(c)), "shared_prefixes must be contiguous"),
    ("paged", "shared_prefixes", lambda c: table(c).to("meta"), "shared_prefixes must be on"),
    ("perceiver", "q", lambda c: c["q"][0], "q must have shape"),
    ("perceiver", "k_context", lambda c: c["k_context"][:, :, 1:], "k_context must have shape"),
    ("perceiver", "v_context", lambda c: c["v_context"][1:], "v_context must have shape"),
    ("perceiver", "k_latents", lambda c: c["k_latents"][:, 1:], "k_latents must have shape"),
    ("perceiver", "v_latents", lambda c: c["v_latents"][1:], "v_latents must have shape"),
    ("perceiver", "q", lambda c: c["q"][:, :, :3], "q must have a multiple of the 2 key heads"),
    ("perceiver", "v_latents", lambda c: spread(c["v_latents"]), "v_latents must have a contig"),
    ("perceiver", "cu_seqlens", lambda c: c["cu_seqlens"][1:], "cu_seqlens must have shape"),
    ("perceiver", "scale", lambda _: 0.0, "scale must be positive, got 0.0"),
    ("perceiver", "k_latents", lambda c: c["k_latents"].to("meta"), "k_latents must be on"),
]


@pytest.mark.parametrize(("kernel", "name", "change", "message"), BAD_VALUES)
def test_wrong_value_is_named(
    kernel: str, name: str, change: Change, message: str, device: torch.device
) -> None:
    operation, make = CALLS[kernel]
    call = make(device)
    operation(**call)
    call[name] = change(call)
    with pytest.raises(ValueError, match=message):
        operation(**call)


@pytest.mark.parametrize(
    ("kernel", "name", "dtype"),
    [
        ("flash", "q", torch.float64),
        ("flash", "k", torch.float16),
        ("flash", "v", torch.float16),
        ("flash", "cu_seqlens", torch.int64),
        ("paged", "q", torch.int32),
        ("paged", "k_cache", torch.float16),
        ("paged", "v_cache", torch.bfloat16),
        ("paged", "block_table", torch.int64),
        ("paged", "context_lens", torch.int64),
        ("paged", "cu_seqlens", torch.int64),
        ("paged", "shared_prefixes", torch.int64),
        ("perceiver", "q", torch.float64),
        ("perceiver", "k_context", torch.float16),
        ("perceiver", "v_latents", torch.float16),
        ("perceiver", "cu_seqlens", torch.int64),
    ],
)
def test_wrong_dtype_is_named(
    kernel: str, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    operation, make = CALLS[kernel]
    call = make(device)
    call |= {"shared_prefixes": table(call)} if kernel == "paged" else {}
    with pytest.raises(TypeError, match=f"{name} must be"):
        operation(**call | {name: call[name].to(dtype)})


@pytest.mark.parametrize("kernel", CALLS)
def test_head_dim_over_256_is_refused(kernel: str, device: torch.device) -> None:
    operation, make = CALLS[kernel]
    call = {
        name: value.repeat_interleave(17, -1)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in make(device).items()
    }
    with pytest.raises(ValueError, match="q must have a head dim from 1 to 256, got 272"):
        operation(**call)


@pytest.mark.parametrize("P", [8, 48])
def test_page_must_be_a_tile(P: int, device: torch.device) -> None:
    call = paged_call(device)
    caches = {name: torch.zeros(3, 2, P, 16, device=device) for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=f"k_cache must have pages .* got {P}"):
        paged_attention(**call | caches)


@pytest.mark.parametrize(
    ("D", "parts"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (72, (64, 16)),
        (96, (64, 32)),
        (128, (128, 0)),
        (200, (128, 128)),
    ],
)
def test_head_parts_cover_the_head(D: int, parts: tuple[int, int]) -> None:
    assert head_parts(D) == parts
    assert all(sum(head_parts(d)) >= d for d in range(1, 257))


def test_alignment_is_common_to_all_rows() -> None:
    x = torch.zeros(4, 2, 72, dtype=torch.float16)
    assert alignment(x, x[:, 1:]) == 8
    assert alignment(x, x.flatten()[1:144].view(1, 1, -1)) == 1
    assert alignment(torch.zeros(4, 2, 70, dtype=torch.float16)) == 1
    assert alignment(torch.zeros(4, 2, 68)) == 4


def integers(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, device=device).to(torch.bfloat16)


@pytest.mark.parametrize("D", [72, 96, 128])
def test_equal_scores_give_an_exact_mean(D: int, device: torch.device) -> None:
    """Every weight is exactly 1, sums are small integers, and the divisor is a power of two."""
    T = 128
    q, k = torch.zeros(T, 2, D, dtype=torch.bfloat16, device=device), integers(device, T, 1, D)
    v, cu_seqlens = integers(device, T, 1, D), cumulative(device, T)
    mean = v.float().mean(0, keepdim=True).to(torch.bfloat16)
    whole = flash_attention(q, k, v, cu_seqlens, T, causal=False)
    assert_truncated(whole, mean.expand(T, 2, D))

    pages = v.view(2, 64, 1, D).transpose(1, 2).contiguous()
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    lens = torch.tensor([T], dtype=torch.int32, device=device)
    one = cumulative(device, 1)
    decoded = paged_attention(q[:1], pages, pages, table, lens, one, 1)
    assert_truncated(decoded, mean.expand(1, 2, D))
    chunk = paged_attention(q[:2], pages, pages, table, lens, cumulative(device, 2), 2)
    assert_truncated(chunk[1:], mean.expand(1, 2, D))

    context, latents = v[:64], v[64:][None]
    resampled = perceiver_attention(
        q[:64][None], context, context, latents, latents, cumulative(device, 64), 64
    )
    assert_truncated(resampled, mean.expand(1, 64, 2, D))


def assert_truncated(actual: Tensor, expected: Tensor) -> None:
    """Check that both are equal, or in the interpreter equal up to the last bit.

    The interpreter truncates fp32 to bf16 instead of rounding.
    """
    if actual.is_cuda:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0.0)


def test_interpreter_sums_exactly_in_fp32(device: torch.device) -> None:
    v = integers(device, 128, 1, 72).float()
    q = torch.zeros(128, 1, 72, device=device)
    out = flash_attention(q, v, v, cumulative(device, 128), 128, causal=False)
    assert torch.equal(out, v.mean(0, keepdim=True).expand_as(out))


def test_padded_query_gives_zeros_and_changes_no_other(device: torch.device) -> None:
    """A graph's batch is padded with sequences of one query and no key.

    Their block table is undefined.
    """
    call = paged_call(device) | {"cu_seqlens": cumulative(device, 1, 1, 0), "max_seqlen": 1}
    call["q"] = call["q"][:2]
    call["block_table"] = torch.full((3, 2), 2**31 - 1, dtype=torch.int32, device=device)
    call["block_table"][0] = torch.tensor([2, 0])
    call["context_lens"] = torch.tensor([18, 0, 0], dtype=torch.int32, device=device)
    out = paged_attention(**call)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out, reference.paged_attention(**call))


@pytest.mark.parametrize("programs", [1, 3, 12, 1000])
def test_dividing_keys_of_a_sequence_changes_nothing(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_module, "PROGRAMS", programs)
    lengths, pages = (77, 0, 16, 33), torch.randperm(20, device=device).int()
    k_cache, v_cache = torch.randn(2, 20, 2, 16, 16, device=device)
    call = {
        # The second sequence has no query
        "q": torch.randn(3, 4, 16, device=device),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": pages.view(4, 5),
        "context_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "cu_seqlens": cumulative(device, 1, 0, 1, 1),
        "max_seqlen": 1,
    }
    torch.testing.assert_close(paged_attention(**call), reference.paged_attention(**call))


def shared_call(device: torch.device) -> Call:
    """Return a decode step of 6 sequences, of which the last 5 share 4 of their pages."""
    shared, lens = 4, [70, 66, 100, 65, 80, 128]
    pages = torch.randperm(64).int()
    block_table = pages[shared : shared + 48].view(6, 8).clone()
    block_table[1:, :shared] = pages[:shared]
    context_lens = torch.tensor(lens, dtype=torch.int32)
    # Few pages, because the kernel is interpreted without a GPU
    with patch("idefics2_engine.scheduling.shared_prefixes.MIN_PAGES", 4):
        found = find_shared_prefixes(
            block_table.numpy(),
            context_lens.numpy(),
            page_size=16,
            window=200,
            num_kv_heads=2,
            max_members=3,
        )
    assert found[:, 0].tolist() == [0, 4, 4, 4, 4, 4]
    k_cache, v_cache = torch.randn(2, 64, 2, 16, 16).half().to(device)
    call = {
        "q": torch.randn(6, 4, 16).half(),
        "block_table": block_table,
        "context_lens": context_lens,
        "cu_seqlens": torch.arange(7, dtype=torch.int32),
        "shared_prefixes": torch.from_numpy(found),
    }
    moved = {name: tensor.to(device) for name, tensor in call.items()}
    return moved | {"k_cache": k_cache, "v_cache": v_cache, "max_seqlen": 1, "window": 200}


def test_prefixes_that_the_engine_finds_are_read_once(device: torch.device) -> None:
    """Prefixes are read through one table for each item, and their pages by nobody else."""
    call = shared_call(device)
    expected = reference.paged_attention(**call)
    found = call["shared_prefixes"].tolist()
    firsts = {found[begin][2] for *_, begin, end, _ in found if begin < end}
    assert len(firsts) == 2
    # A further read of the prefix would read NaN.
    broken = call["block_table"][0, -1]
    call["k_cache"][broken.long()] = float("nan")
    for b in set(range(1, 6)) - firsts:
        call["block_table"][b, :4] = broken
    torch.testing.assert_close(paged_attention(**call), expected, atol=2e-3, rtol=2e-3)
    assert not get_counters(64, device).any()


def test_the_order_of_arrival_changes_no_bit(device: torch.device) -> None:
    call = shared_call(device)
    first = paged_attention(**call)
    found = call["shared_prefixes"]
    for _ in range(4):
        found[:, 3:] = found[torch.randperm(6, device=device), 3:]
        assert torch.equal(paged_attention(**call), first)
    assert not get_counters(64, device).any()


def test_a_table_without_groups_changes_no_bit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = shared_call(device)
    call["shared_prefixes"].zero_()
    # A table is for batches that fill the GPU without splitting sequences.
    monkeypatch.setattr(decode_module, "PROGRAMS", 1)
    plain = paged_attention(**{k: v for k, v in call.items() if k != "shared_prefixes"})
    assert torch.equal(paged_attention(**call), plain)


@pytest.mark.gpu
def test_one_graph_serves_every_grouping(device: torch.device) -> None:
    call = shared_call(device)
    table, recorded = call["shared_prefixes"].clone(), call["shared_prefixes"]
    groupings = [table, torch.zeros_like(table), table]
    expected = [paged_attention(**call | {"shared_prefixes": one}) for one in groupings]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(**call)
    for one, wanted in zip(groupings, expected, strict=True):
        recorded.copy_(one)
        for _ in range(20):
            graph.replay()
            assert torch.equal(out, wanted)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_dividing_perceiver_keys_changes_nothing(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceiver_module, "PROGRAMS", programs)
    lengths = (150, 0, 64)
    call = perceiver_call(device) | {
        "q": torch.randn(3, 3, 4, 16, device=device),
        "cu_seqlens": cumulative(device, *lengths),
        "max_seqlen": max(lengths),
    }
    for name in ("k_context", "v_context"):
        call[name] = torch.randn(sum(lengths), 2, 16, device=device)
    for name in ("k_latents", "v_latents"):
        call[name] = torch.randn(3, 3, 2, 16, device=device)
    torch.testing.assert_close(perceiver_attention(**call), reference.perceiver_attention(**call))


@pytest.mark.parametrize(
    "case",
    [c for s in CATALOG if s.name == "flash_attention" for c in s.cases if c.where == "any"],
    ids=lambda case: case.name,
)
def test_reference_of_chosen_rows_equals_the_reference(case: Case, device: torch.device) -> None:
    spec = next(spec for spec in CATALOG if spec.name == "flash_attention")
    inputs = spec.make_inputs(case, device)
    rows = torch.arange(0, inputs["q"].shape[0], 3, device=device)
    if not len(rows):
        pytest.skip("no rows")
    inputs = {k: v.double() if k in ("q", "k", "v") else v for k, v in inputs.items()}
    expected = reference.flash_attention(**inputs)[rows]
    torch.testing.assert_close(flash_attention_rows(**inputs, rows=rows), expected)


# Tests of offsets past 2**31 elements. Keys at both ends of 4.3 GB are read, and the rest is NaN.

_MANY = 2**31


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.parametrize("window", [None, 64])
def test_flash_attention_past_two_to_the_31(window: int | None, device: torch.device) -> None:
    H, D, S = 64, 128, 200
    T = _MANY // (H * D) + S
    wide = torch.full((T, H, D), float("nan"), dtype=torch.bfloat16, device=device)
    q, k, v = wide[:, :3].split(1, 1)
    for x in (q, k, v):
        for part in (x[:S], x[-S:]):
            part.copy_(torch.randn(part.shape, device=device))
    cu_seqlens = torch.tensor([0, S, T - S, T], dtype=torch.int32, device=device)
    out = flash_attention(q, k, v, cu_seqlens, T - 2 * S, causal=True, window=window)
    for part in (slice(0, S), slice(T - S, T)):
        expected = reference.flash_attention(
            q[part].float(),
            k[part].float(),
            v[part].float(),
            cumulative(device, S),
            S,
            causal=True,
            window=window,
        )
        torch.testing.assert_close(out[part].float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.parametrize("S", [1, 40])
def test_paged_attention_past_two_to_the_31(S: int, device: torch.device) -> None:
    H_KV, P, D, T = 8, 64, 128, 300
    pages = _MANY // (H_KV * P * D) + 8
    caches = [
        torch.full((pages, H_KV, P, D), float("nan"), dtype=torch.bfloat16, device=device)
        for _ in range(2)
    ]
    table = torch.tensor([[pages - 1 - p for p in range(5)]], dtype=torch.int32, device=device)
    near = [torch.randn(5, H_KV, P, D, device=device).to(torch.bfloat16) for _ in range(2)]
    for cache, values in zip(caches, near, strict=True):
        cache[table[0].long()] = values
    q = torch.randn(S, 32, D, device=device).to(torch.bfloat16)
    lens = torch.tensor([T], dtype=torch.int32, device=device)
    queries = cumulative(device, S)
    out = paged_attention(q, caches[0], caches[1], table, lens, queries, S)
    order = torch.arange(5, dtype=torch.int32, device=device)[None]
    expected = reference.paged_attention(
        q.float(), near[0].float(), near[1].float(), order, lens, queries, S
    )
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.huge
def test_perceiver_attention_past_two_to_the_31(device: torch.device) -> None:
    H, D, S, L = 64, 96, 200, 64
    P = _MANY // (H * D) + S
    wide = torch.full((P, H, D), float("nan"), dtype=torch.bfloat16, device=device)
    k, v = wide[:, :4], wide[:, 4:8]
    for x in (k, v):
        x[-S:] = torch.randn(S, 4, D, device=device).to(torch.bfloat16)
    q, k_latents, v_latents = (
        torch.randn(2, L, heads, D, device=device).to(torch.bfloat16) for heads in (16, 4, 4)
    )
    cu_seqlens = torch.tensor([0, P - S, P], dtype=torch.int32, device=device)
    out = perceiver_attention(q, k, v, k_latents, v_latents, cu_seqlens, P - S)
    expected = reference.perceiver_attention(
        q[1:].float(),
        k[-S:].float(),
        v[-S:].float(),
        k_latents[1:].float(),
        v_latents[1:].float(),
        cumulative(device, S),
        S,
    )
    torch.testing.assert_close(out[1:].float(), expected, atol=2e-2, rtol=2e-2)
