"""``ROW_BY_ROW`` computes what the reference does, and each row's bits are those of the row alone."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from idefics2_kernels import REFERENCE, ROW_BY_ROW, Ops

H, H_KV, D, P = 4, 2, 16, 8


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_products(name: str, rows: int) -> None:
    x, weight, bias = torch.randn(rows, 96), torch.randn(80, 96), torch.randn(80)
    out = getattr(ROW_BY_ROW, name)(x, weight, bias)
    close(out, getattr(REFERENCE, name)(x, weight, bias))
    # Each row begins at another address than in the batch
    alone = [
        getattr(ROW_BY_ROW, name)(x[row : row + 1].clone(), weight, bias) for row in range(rows)
    ]
    assert equal_bits(out, torch.cat(alone))


def test_nf4_product() -> None:
    x = torch.randn(5, 128)
    weight = REFERENCE.nf4_quantize(torch.randn(64, 128))
    out = ROW_BY_ROW.nf4_matmul(x, weight)
    close(out, REFERENCE.nf4_matmul(x, weight))
    assert equal_bits(out[3:4], ROW_BY_ROW.nf4_matmul(x[3:4], weight))


@pytest.mark.parametrize("is_quantized", [False, True])
def test_low_rank_product(is_quantized: bool) -> None:
    x, a, b = torch.randn(5, 128), torch.randn(8, 128), torch.randn(64, 8)
    weight = torch.randn(64, 128)
    base = REFERENCE.nf4_quantize(weight) if is_quantized else weight
    out = ROW_BY_ROW.lora_linear(x, base, a, b, 0.5)
    torch.testing.assert_close(out, REFERENCE.lora_linear(x, base, a, b, 0.5), rtol=1e-4, atol=1e-4)
    assert equal_bits(out[3:4], ROW_BY_ROW.lora_linear(x[3:4], base, a, b, 0.5))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention(causal: bool, window: int | None) -> None:
    q, k, v = torch.randn(20, H, D), torch.randn(20, H_KV, D), torch.randn(20, H_KV, D)

    def attend(ops: Ops, part: slice, bounds: list[int]) -> Tensor:
        return ops.flash_attention(
            q[part].clone(),
            k[part].clone(),
            v[part].clone(),
            torch.tensor(bounds, dtype=torch.int32),
            max(b - a for a, b in pairwise(bounds)),
            causal=causal,
            window=window,
        )

    whole = slice(None)
    out = attend(ROW_BY_ROW, whole, [0, 7, 19, 20])
    close(out, attend(REFERENCE, whole, [0, 7, 19, 20]))
    assert equal_bits(out[7:19], attend(ROW_BY_ROW, slice(7, 19), [0, 12]))


def test_perceiver_attention() -> None:
    latents, patches = torch.randn(3, 4, H, D), torch.randn(21, H_KV, D)
    own = torch.randn(3, 4, H_KV, D)
    bounds = torch.tensor([0, 9, 16, 21], dtype=torch.int32)

    def attend(ops: Ops) -> Tensor:
        return ops.perceiver_attention(latents, patches, 2 * patches, own, -own, bounds, 9)

    out = attend(ROW_BY_ROW)
    close(out, attend(REFERENCE))
    alone = ROW_BY_ROW.perceiver_attention(
        latents[1:2], patches[9:16], 2 * patches[9:16], own[1:2], -own[1:2],
        torch.tensor([0, 7], dtype=torch.int32), 7,
    )  # fmt: skip
    assert equal_bits(out[1:2], alone)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("chunks", [[19], [1] * 19, [8, 11], [3, 9, 1, 6]])
def test_pages_and_chunks(chunks: list[int], window: int | None) -> None:
    """A prompt in chunks, or token by token, gives the bits of the packed attention."""
    q, k, v = torch.randn(19, H, D), torch.randn(19, H_KV, D), torch.randn(19, H_KV, D)
    k_cache, v_cache = (
        torch.cat([one, torch.full((5, H_KV, D), float("nan"))])
        .view(3, P, H_KV, D).transpose(1, 2).contiguous()
        for one in (k, v)
    )  # fmt: skip
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)

    def attend(ops: Ops) -> Tensor:
        outs, begin = [], 0
        for size in chunks:
            outs.append(
                ops.paged_attention(
                    q[begin : begin + size].clone(), k_cache, v_cache, table,
                    torch.tensor([begin + size], dtype=torch.int32),
                    torch.tensor([0, size], dtype=torch.int32), size, window=window,
                )
            )  # fmt: skip
            begin += size
        return torch.cat(outs)

    out = attend(ROW_BY_ROW)
    close(out, attend(REFERENCE))
    packed: Callable[..., Tensor] = ROW_BY_ROW.flash_attention
    bounds = torch.tensor([0, 19], dtype=torch.int32)
    assert equal_bits(out, packed(q, k, v, bounds, 19, causal=True, window=window))
