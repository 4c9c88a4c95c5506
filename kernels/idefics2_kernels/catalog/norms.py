"""Rows of the catalog: norms."""

import torch

from idefics2_kernels.catalog.layouts import normal
from idefics2_kernels.catalog.rowwise import TEXT_ROWS, VISION_ROWS, rowwise_cases, rowwise_cost
from idefics2_kernels.catalog.spec import Case, Inputs, KernelSpec
from idefics2_kernels.norms import layer_norm, rms_norm

_SIZES = ((1, 1), (1, 64), (5, 123), (3, 127), (17, 129), (7, 31), (0, 64), (4, 1152))
_GPU_SIZES = ((1, 4096), (257, 1151), (1023, 4097), (131, 997), (64, 8192))


def norm_cases(model_n: int, rows: dict[str, int]) -> tuple[Case, ...]:
    """Return the cases of a norm of rows of ``model_n`` columns in the model."""
    magnitudes = (
        Case("tiny", {"shape": (3, 96), "scale": 1e-4}),
        Case("large", {"shape": (3, 96), "scale": 100.0}),
        Case("far-from-zero", {"shape": (3, 96), "shift": 30.0}, torch.float32),
    )
    return rowwise_cases(_SIZES, magnitudes, _GPU_SIZES, (5, 37, 1151), model_n, rows)


def rms_norm_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``rms_norm``."""
    shape, dims = case.dims["shape"], case.dims
    x = normal(
        *shape,
        dtype=case.dtype,
        device=device,
        layout=dims.get("layout", "plain"),
        scale=dims.get("scale", 1.0),
    )
    x += dims.get("shift", 0.0)
    return {
        "x": x,
        "weight": 1 + normal(shape[-1], dtype=case.dtype, device=device, scale=0.1),
        "eps": 1e-5,
    }


def layer_norm_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``layer_norm``."""
    bias = normal(case.dims["shape"][-1], dtype=case.dtype, device=device)
    return {**rms_norm_inputs(case, device), "bias": bias}


def _with_residual(inputs: Inputs) -> Inputs:
    x = inputs["x"]
    return {**inputs, "residual": normal(*x.shape, dtype=x.dtype, device=x.device)}


NORMS = (
    KernelSpec(
        name="rms_norm",
        make_inputs=rms_norm_inputs,
        cases=norm_cases(4096, TEXT_ROWS),
        cost=lambda case: rowwise_cost(case, passes=2, vectors=1, flops=4),
        implementations={"triton": rms_norm.rms_norm},
    ),
    KernelSpec(
        name="add_rms_norm",
        make_inputs=lambda case, device: _with_residual(rms_norm_inputs(case, device)),
        cases=norm_cases(4096, TEXT_ROWS),
        cost=lambda case: rowwise_cost(case, passes=4, vectors=1, flops=5),
        implementations={"triton": rms_norm.add_rms_norm},
    ),
    KernelSpec(
        name="layer_norm",
        make_inputs=layer_norm_inputs,
        cases=norm_cases(1152, VISION_ROWS),
        cost=lambda case: rowwise_cost(case, passes=2, vectors=2, flops=7),
        implementations={"triton": layer_norm.layer_norm},
    ),
    KernelSpec(
        name="add_layer_norm",
        make_inputs=lambda case, device: _with_residual(layer_norm_inputs(case, device)),
        cases=norm_cases(1152, VISION_ROWS),
        cost=lambda case: rowwise_cost(case, passes=4, vectors=2, flops=8),
        implementations={"triton": layer_norm.add_layer_norm},
    ),
)
