"""The small kernels apart from parity: refused arguments, and the draws of `sample`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.catalog import CATALOG
from idefics2_kernels.ops import TRITON
from idefics2_kernels.reference import sampling as reference
from idefics2_kernels.sample import philox_uniform

Inputs = dict[str, Any]
SMALL = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "add_layer_norm",
    "silu_mul",
    "gelu_tanh",
    "rotary",
    "rotary_and_cache",
    "patches",
    "apply_bitmask",
    "sample",
)


def inputs_of(name: str, device: torch.device) -> Inputs:
    """Draw the arguments of the operation's first plain case of more than one row."""
    spec = next(spec for spec in CATALOG if spec.name == name)
    case = next(
        case
        for case in spec.cases
        if case.name in ("5x123-float32", "5-4-2-72-float32", "mixed-float32", "mixed")
    )
    return spec.make_inputs(case, device)


def every_other(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with a gap after every element of the last axis."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


WRONG: list[tuple[str, str, Callable[[Tensor], object], type[Exception]]] = [
    *(
        (name, argument, change, error)
        for name, arguments in {
            "rms_norm": ("x", "weight"),
            "add_rms_norm": ("x", "residual", "weight"),
            "layer_norm": ("x", "weight", "bias"),
            "add_layer_norm": ("x", "residual", "weight", "bias"),
            "silu_mul": ("gate_up",),
            "gelu_tanh": ("x", "bias"),
            "rotary": ("q", "k", "cos_sin"),
            "rotary_and_cache": ("q", "k", "v", "cos_sin", "k_cache", "v_cache"),
            "apply_bitmask": ("logits",),
            "sample": ("logits", "temperature", "top_p", "min_p"),
        }.items()
        for argument in arguments
        for change, error in ((Tensor.double, TypeError),)
    ),
    *(
        (name, argument, every_other, ValueError)
        for name, arguments in {
            "rms_norm": ("x",),
            "add_rms_norm": ("x", "residual"),
            "layer_norm": ("x",),
            "add_layer_norm": ("x", "residual"),
            "silu_mul": ("gate_up",),
            "gelu_tanh": ("x",),
            "rotary": ("q", "k", "cos_sin"),
            "rotary_and_cache": ("q", "k", "v", "cos_sin", "k_cache", "v_cache"),
            "apply_bitmask": ("logits", "bits"),
            "sample": ("logits",),
        }.items()
        for argument in arguments
    ),
    *(
        (name, argument, lambda t: t[:-1], ValueError)
        for name, arguments in {
            "rms_norm": ("weight",),
            "add_rms_norm": ("residual", "weight"),
            "layer_norm": ("weight", "bias"),
            "add_layer_norm": ("residual", "weight", "bias"),
            "gelu_tanh": ("bias",),
            "rotary": ("k", "positions"),
            "rotary_and_cache": ("k", "v", "v_cache", "positions", "slots"),
            "patches": ("pixels", "cu_seqlens"),
            "apply_bitmask": ("bits",),
            "sample": ("temperature", "top_k", "top_p", "min_p", "seed", "index"),
        }.items()
        for argument in arguments
    ),
    *(
        (name, argument, lambda t: t.to("meta"), ValueError)
        for name, arguments in {
            "rms_norm": ("weight",),
            "add_rms_norm": ("residual", "weight"),
            "layer_norm": ("weight", "bias"),
            "add_layer_norm": ("residual", "weight", "bias"),
            "gelu_tanh": ("bias",),
            "rotary": ("k", "positions", "cos_sin"),
            "rotary_and_cache": ("k", "v", "positions", "cos_sin", "k_cache", "v_cache", "slots"),
            "patches": ("cu_seqlens", "widths"),
            "apply_bitmask": ("rows", "bits"),
            "sample": ("temperature", "top_k", "top_p", "min_p", "seed", "index"),
        }.items()
        for argument in arguments
    ),
    ("silu_mul", "gate_up", lambda t: t[..., :-1], ValueError),
    ("rotary", "q", lambda t: t[0], ValueError),
    ("rotary", "positions", Tensor.float, TypeError),
    ("rotary_and_cache", "slots", Tensor.float, TypeError),
    ("rotary_and_cache", "k_cache", lambda t: t[0], ValueError),
    ("patches", "pixels", Tensor.float, TypeError),
    ("patches", "widths", Tensor.float, TypeError),
    ("patches", "cu_seqlens", Tensor.float, TypeError),
    ("apply_bitmask", "logits", lambda t: t[0], ValueError),
    ("apply_bitmask", "rows", Tensor.float, TypeError),
    ("apply_bitmask", "bits", Tensor.long, TypeError),
    ("apply_bitmask", "bits", lambda t: t[:, :-1], ValueError),
    ("sample", "logits", lambda t: t[0], ValueError),
    ("sample", "logits", lambda t: t[:, :0], ValueError),
    ("sample", "seed", Tensor.int, TypeError),
    ("sample", "top_k", Tensor.float, TypeError),
]


@pytest.mark.parametrize(("name", "argument", "change", "error"), WRONG)
def test_wrong_argument_is_named(
    name: str,
    argument: str,
    change: Callable[[Tensor], object],
    error: type[Exception],
    device: torch.device,
) -> None:
    inputs = inputs_of(name, device)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(error, match=f"^{argument} must"):
        getattr(TRITON, name)(**inputs)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("std", (0.5,), ValueError),
        ("mean", (), ValueError),
        ("std", (0.5, 0.0, 0.5), ValueError),
        ("patch_size", 0, ValueError),
        ("dtype", torch.float64, TypeError),
    ],
)
def test_patches_refuses_wrong_arguments(
    argument: str, value: object, error: type[Exception], device: torch.device
) -> None:
    with pytest.raises(error, match="must"):
        TRITON.patches(**{**inputs_of("patches", device), argument: value})


def test_patches_accepts_an_odd_address(device: torch.device) -> None:
    inputs = inputs_of("patches", device)
    pixels = inputs["pixels"]
    odd = torch.zeros(pixels.numel() + 1, dtype=torch.uint8, device=device)[1:].copy_(pixels)
    assert torch.equal(TRITON.patches(**{**inputs, "pixels": odd}), TRITON.patches(**inputs))


@pytest.mark.parametrize("name", SMALL)
def test_inputs_are_not_changed(name: str, device: torch.device) -> None:
    inputs = inputs_of(name, device)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    getattr(TRITON, name)(**inputs)
    for argument, was in before.items():
        changes = argument.endswith("cache") or (name, argument) == ("apply_bitmask", "logits")
        assert torch.equal(inputs[argument], was) != changes, argument


def test_bitmask_of_many_shapes(device: torch.device) -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        B, V = int(torch.randint(1, 6, ())), int(torch.randint(1, 700, ()))
        rows = torch.randperm(B, device=device)[: seed % (B + 1)]
        bits = torch.randint(-(2**31), 2**31, (len(rows), -(-V // 32)), device=device).int()
        bits *= seed % 7 != 0
        logits = torch.randn(B, V, device=device)
        if seed % 3 == 0:
            for value in (math.nan, math.inf, -math.inf):
                logits[torch.rand(B, V, device=device) < 0.1] = value
        ours, theirs = logits.clone(), logits.clone()
        TRITON.apply_bitmask(ours, rows, bits)
        reference.apply_bitmask(theirs, rows, bits)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@triton.jit  # type: ignore[untyped-decorator]
def _philox_kernel(seed_ptr, index_ptr, out_ptr, N, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    offs_n = tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr + offs_n, mask=offs_n < N, other=0)
    index = tl.load(index_ptr + offs_n, mask=offs_n < N, other=0)
    tl.store(out_ptr + offs_n, philox_uniform(seed, index), mask=offs_n < N)


def test_random_stream_equals_the_reference(device: torch.device) -> None:
    seed = torch.randint(-(2**63), 2**63 - 1, (1000,), device=device)
    index = torch.randint(0, 2**40, (1000,), device=device)
    seed[:2], index[:2] = 0, torch.tensor([0, 1], device=device)
    drawn = torch.empty(1000, device=device)
    _philox_kernel[(1,)](seed, index, drawn, 1000, BLOCK_N=1024)
    assert torch.equal(drawn, reference.philox_uniform(seed, index))


def draw(logits: Tensor, n: int, **options: Any) -> Tensor:
    """Draw ``n`` tokens from one row of ``logits`` (V,)."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), options.get(name, default), dtype=dtype, device=logits.device)

    return TRITON.sample(
        logits.expand(n, -1),
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        column("seed", 5, torch.int64),
        torch.arange(n, device=logits.device),
        min_p_first=options.get("min_p_first", True),
    )


def expected_distribution(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Return the probability of each token (V,), computed one token after another.

    min-p comes last.
    """
    weights = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    whole, above = sum(weights[token] for token in ranked), 0.0
    probabilities = torch.zeros(len(weights), dtype=torch.float64)
    for token in ranked:
        if above < top_p * whole and weights[token] >= min_p * weights[ranked[0]]:
            probabilities[token] = weights[token]
        above += weights[token]
    return probabilities / probabilities.sum()


def assert_distributed(tokens: Tensor, want: Tensor) -> None:
    """Apply Pearson's test at five standard deviations."""
    counts = tokens.cpu().bincount(minlength=want.numel()).double()
    assert not counts[want == 0].any()
    expected = want[want > 0] * counts.sum()
    chi_square = ((counts[want > 0] - expected) ** 2 / expected).sum()
    freedom = int((want > 0).sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_few_draws_have_the_expected_distribution(device: torch.device) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -math.inf, 1.5], device=device)
    assert_distributed(draw(logits, 200, top_k=3), expected_distribution(logits, top_k=3))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
        {"top_k": 9, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("V", [40, 2000])
def test_many_draws_have_the_expected_distribution(
    V: int, options: dict[str, Any], device: torch.device
) -> None:
    logits = torch.full((V,), -30.0, device=device)
    logits[torch.randperm(V, device=device)[:40]] = 2 * torch.randn(40, device=device)
    tokens = draw(logits, 20_000, min_p_first=False, **options)
    want = expected_distribution(logits, **options)
    # The test covers tokens that are likely to be drawn
    want[want * 20_000 < 1e-3] = 0
    assert_distributed(tokens, want / want.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("V", [50, 32003])
def test_thousands_of_rows_equal_the_reference(V: int, device: torch.device) -> None:
    B = 4096
    logits = 3 * torch.randn(B, V, device=device)
    columns = {
        "temperature": 0.1 + 2 * torch.rand(B, device=device),
        "top_k": torch.randint(0, 100, (B,), device=device),
        "top_p": 0.05 + torch.rand(B, device=device).clamp(max=0.95),
        "min_p": 0.2 * torch.rand(B, device=device),
        "seed": torch.randint(2**62, (B,), device=device),
        "index": torch.arange(B, device=device),
    }
    for first in (True, False):
        ours = TRITON.sample(logits, **columns, min_p_first=first)
        theirs = reference.sample(logits, **columns, min_p_first=first)
        # A random number or top_p may be within a rounding error of a boundary
        assert (ours != theirs).sum() <= 4


def test_greedy_options_choose_a_maximum(device: torch.device) -> None:
    logits = torch.tensor([0.5, 3.0, 1e4, 9e3, 1e4], device=device)
    for options in ({"temperature": 0.0}, {"temperature": 1e-30, "top_k": 1}, {"min_p": 1.0}):
        assert set(draw(logits, 8, **options).tolist()) <= {2, 4}
    assert set(draw(logits, 4, temperature=0.0).tolist()) == {2}
    only = torch.full((9,), -math.inf, device=device)
    only[7] = -3.0
    assert set(draw(only, 4, top_p=0.5, top_k=3).tolist()) == {7}
