"""Row of the catalog: the loss of a linear head, and its gradients."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.backward import linear_cross_entropy
from idefics2_kernels.catalog.attention import DTYPES, case_name
from idefics2_kernels.catalog.layouts import LAYOUTS, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec, Outputs
from idefics2_kernels.gradients import REFERENCE_GRADIENTS

_FP32, _FP16, _BF16 = DTYPES
# Shares of labeled rows.
_ALL, _SOME, _NONE = 1.0, 0.4, 0.0


def _dims(T: int, K: int, V: int, share: float, **dims: Any) -> dict[str, Any]:
    return {"T": T, "K": K, "V": V, "share": share, "weight_grad": True, **dims}


def _cases() -> tuple[Case, ...]:
    cases = [
        Case(case_name(name, dtype), _dims(9, 24, 33, share), dtype)
        for name, share in (("all", _ALL), ("some", _SOME), ("none", _NONE))
        for dtype in DTYPES
    ]
    cases += [
        Case("one", _dims(1, 24, 33, _ALL), _BF16),
        Case("no-tokens", _dims(0, 24, 33, _ALL), _BF16),
        Case("one-word", _dims(5, 16, 1, _ALL), _FP32),
        Case("many-words", _dims(9, 8, 9001, _ALL), _FP32),
        Case("300-rows", _dims(300, 8, 40, 0.97), _FP32),
        Case("290-rows-frozen", _dims(290, 8, 40, _ALL, weight_grad=False), _BF16),
        Case("frozen", _dims(9, 24, 33, _SOME, weight_grad=False), _BF16),
        Case("known-rows", _dims(9, 24, 33, _SOME, known=True), _FP16),
        Case("int32", _dims(9, 24, 33, _SOME, integers=torch.int32), _FP32),
        Case("tiny", _dims(9, 24, 33, _ALL, scale=1e-3), _FP32),
        Case("large", _dims(9, 24, 33, _ALL, scale=20.0), _FP32),
        *(Case(layout, _dims(6, 24, 40, _SOME, layout=layout), _FP16) for layout in LAYOUTS[1:3]),
    ]
    cases += [
        Case(case_name("gpu", T, K, V, share, dtype), _dims(T, K, V, share), dtype, "gpu")
        for (T, K, V), share, dtype in product(
            ((1, 64, 100), (64, 40, 4097), (257, 128, 32003), (1031, 96, 4096), (700, 1000, 131)),
            (_ALL, 0.15),
            DTYPES,
        )
    ]
    model: dict[str, Any] = {"known": True, "V": 32003, "K": 4096, "T": 4096}
    cases += [
        Case(name, {**model, "share": share, "weight_grad": trains}, _BF16, "model")
        for name, share, trains in (
            ("4096-all", _ALL, False),
            ("4096-15-percent", 0.15, False),
            ("4096-all-weight", _ALL, True),
        )
    ]
    return tuple(cases)


def _inputs(case: Case, device: torch.device) -> Inputs:
    T, K, V, share = (case.dims[name] for name in ("T", "K", "V", "share"))
    layout, scale = case.dims.get("layout", "plain"), case.dims.get("scale", 1.0)
    hidden = normal(T, K, dtype=case.dtype, device=device, layout=layout, scale=scale)
    weight = normal(V, K, dtype=case.dtype, device=device, scale=2 * K**-0.5)
    if case.dtype is _FP32:
        # With few bits the logits are exact, whatever the order of the product's sums, which
        # libraries choose. An error of a logit is an error of all its gradients.
        hidden.copy_((hidden / scale * 4).round() / 4 * scale)
        weight = (weight * 16).round() / 16
    # Drawn on the host, where the number of rows is known for a tensor without memory as well.
    is_labeled = torch.rand(T) < share
    labeled = torch.nonzero(is_labeled)[:, 0].to(device)
    targets = torch.randint(V, (T,)).masked_fill(~is_labeled, -100)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets.to(device, case.dims.get("integers", torch.int64)),
        "weight_grad": case.dims["weight_grad"],
        "labeled": labeled if case.dims.get("known") else None,
    }


def _outputs(_inputs: Inputs, result: tuple[Tensor, int, Tensor, Tensor | None]) -> Outputs:
    loss, count, dhidden, dweight = result
    # The count is compared as a gradient is.
    counted = torch.tensor([float(count)], dtype=loss.dtype, device=loss.device)
    found = (loss[None], counted, dhidden)
    return found if dweight is None else (*found, dweight)


def _cost(case: Case) -> Cost:
    T, K, V = (case.dims[name] for name in ("T", "K", "V"))
    rows = round(T * case.dims["share"])
    trains = case.dims["weight_grad"]
    elements = (1 + trains) * V * K + (rows + T) * K
    return Cost(bytes=elements * case.dtype.itemsize, flops=(2 + trains) * 2 * rows * K * V)


LINEAR_CROSS_ENTROPY = KernelSpec(
    name="linear_cross_entropy",
    make_inputs=_inputs,
    cases=_cases(),
    cost=_cost,
    implementations={"triton": linear_cross_entropy.linear_cross_entropy},
    outputs=_outputs,
    reference=REFERENCE_GRADIENTS.linear_cross_entropy,
)
