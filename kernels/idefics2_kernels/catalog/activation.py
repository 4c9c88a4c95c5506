"""Rows of the catalog: activations."""

from itertools import product

import torch

from idefics2_kernels import activation
from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.rowwise import (
    FLOATS,
    TEXT_ROWS,
    VISION_ROWS,
    rowwise_cases,
    rowwise_cost,
)
from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec

_SIZES = ((1, 1), (1, 64), (5, 123), (3, 513), (7, 31), (0, 64))
_GPU_SIZES = ((1, 14336), (257, 1151), (1023, 4097), (131, 997), (64, 8192), (4, 511), (5, 512))


def activation_cases(model_n: int, rows: dict[str, int]) -> tuple[Case, ...]:
    """Return the cases of an activation of rows of ``model_n`` columns in the model."""
    magnitudes = [
        Case(f"{name}-{dtype}".replace("torch.", ""), {"shape": (3, 96), "scale": scale}, dtype)
        for (name, scale), dtype in product((("tiny", 1e-4), ("large", 100.0)), FLOATS[:2])
    ]
    return rowwise_cases(_SIZES, magnitudes, _GPU_SIZES, (6, 37, 1031), model_n, rows)


def _drawn(case: Case, device: torch.device, halves: int) -> torch.Tensor:
    *lead, N = case.dims["shape"]
    return normal(
        *lead,
        halves * N,
        dtype=case.dtype,
        device=device,
        layout=case.dims.get("layout", "plain"),
        scale=case.dims.get("scale", 3.0),
    )


def silu_mul_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the argument of ``silu_mul``."""
    return {"gate_up": _drawn(case, device, halves=2)}


def gelu_tanh_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``gelu_tanh``."""
    N = case.dims["shape"][-1]
    # Two of the sizes are tested without a bias.
    has_bias = N not in (31, 997)
    bias = normal(N, dtype=case.dtype, device=device) if has_bias else None
    return {"x": _drawn(case, device, halves=1), "bias": bias}


ACTIVATIONS = (
    KernelSpec(
        name="silu_mul",
        make_inputs=silu_mul_inputs,
        cases=activation_cases(14336, TEXT_ROWS),
        cost=lambda case: rowwise_cost(case, passes=3, vectors=0, flops=5),
        implementations={"triton": activation.silu_mul},
    ),
    KernelSpec(
        name="gelu_tanh",
        make_inputs=gelu_tanh_inputs,
        cases=activation_cases(4304, VISION_ROWS),
        cost=lambda case: rowwise_cost(case, passes=2, vectors=1, flops=9),
        implementations={"triton": activation.gelu_tanh},
    ),
)
