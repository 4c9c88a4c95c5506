"""Row of the catalog: tokens barred by bits.

The logits must equal the reference's bit for bit. NaN in them is compared by its place.
"""

from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import apply_bitmask
from idefics2_kernels.catalog.layouts import LAYOUTS, arrange
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec, Outputs

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Stands for NaN when outputs are compared
_NAN = 12345.0


def _case(name: str, B: int, V: int, R: int, **options: Any) -> Case:
    dtype, where = options.pop("dtype", torch.float32), options.pop("where", "any")
    return Case(name, {"B": B, "V": V, "R": R, **options}, dtype, where)


def _cases() -> tuple[Case, ...]:
    # Vocabularies at the ends of words and of blocks
    sizes = (1, 31, 32, 33, 50, 64, 255, 256, 257, 960, 1024, 1025, 2047, 2049, 4099)
    cases = [_case(f"{V}", 3, V, 2) for V in sizes]
    cases += [
        _case(f"{name}-{dtype}".replace("torch.", ""), B, 333, R, dtype=dtype)
        for name, B, R in (("no-row", 4, 0), ("one-row", 4, 1), ("mixed", 5, 3), ("all-rows", 4, 4))
        for dtype in _FLOATS
    ]
    cases += [
        _case("empty", 0, 50, 0),
        _case("no-token-allowed", 3, 70, 2, allowed=0.0),
        _case("all-allowed", 3, 70, 2, allowed=1.0),
        _case("one-allowed", 3, 70, 3, allowed="one"),
        _case("not-finite", 4, 200, 3, values="not finite"),
        _case("not-finite-half", 4, 2100, 3, values="not finite", dtype=torch.float16),
        _case("int32", 5, 97, 3, integers=torch.int32),
        _case("tiny", 3, 50, 2, scale=1e-6),
    ]
    cases += [_case(layout, 4, 77, 3, layout=layout) for layout in LAYOUTS[1:3]]
    cases += [
        _case(f"gpu-{V}-{R}-{dtype}".replace("torch.", ""), 67, V, R, dtype=dtype, where="gpu")
        for V in (32003, 65537)
        for R in (1, 22, 67)
        for dtype in _FLOATS
    ]
    cases += [
        _case("gpu-not-finite", 67, 32003, 67, values="not finite", where="gpu"),
        _case("gpu-far", 3, 32003, 3, layout="far", dtype=torch.float16, where="huge"),
        *(
            _case(f"b{B}", B, 32003, B, allowed=0.01, dtype=torch.bfloat16, where="model")
            for B in (1, 32, 128)
        ),
    ]
    return tuple(cases)


def _inputs(case: Case, device: torch.device) -> Inputs:
    B, V, R = (case.dims[name] for name in ("B", "V", "R"))
    logits = torch.randn(B, V, device=device) * case.dims.get("scale", 2.5)
    if case.dims.get("values") == "not finite":
        for value in (float("nan"), float("inf"), float("-inf")):
            logits[torch.rand(B, V, device=device) < 0.2] = value
    rows = torch.randperm(B, device=device)[:R]
    return {
        "logits": arrange(logits.to(case.dtype), case.dims.get("layout", "plain")),
        "rows": rows.to(case.dims.get("integers", torch.int64)),
        "bits": _bits(R, V, case.dims.get("allowed", 0.5), device),
    }


def _bits(R: int, V: int, allowed: float | str, device: torch.device) -> Tensor:
    """Draw bits (R, W) of which a share ``allowed``, or one of each row, is 1."""
    width = -(-V // 32) * 32
    if isinstance(allowed, str):
        is_allowed = torch.zeros(R, width, dtype=torch.bool, device=device)
        is_allowed[torch.arange(R), torch.arange(R) * 31 % V] = True
    else:
        is_allowed = torch.rand(R, width, device=device) < allowed
    weights = 2 ** torch.arange(32, device=device)
    words = (is_allowed.view(R, width // 32, 32) * weights).sum(-1)
    # From 32 bits without a sign to 32 with one
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _logits(inputs: Inputs, _result: None) -> Outputs:
    logits: Tensor = inputs["logits"]
    infinity = float("inf")
    return (logits.nan_to_num(_NAN, posinf=infinity, neginf=-infinity),)


def _cost(case: Case) -> Cost:
    R, V = case.dims["R"], case.dims["V"]
    allowed = case.dims.get("allowed", 0.5)
    barred = R * V - R if allowed == "one" else int(R * V * (1 - allowed))
    words = R * -(-V // 32)
    return Cost(bytes=2 * barred * case.dtype.itemsize + 4 * words + 8 * R, flops=barred)


APPLY_BITMASK = (
    KernelSpec(
        name="apply_bitmask",
        make_inputs=_inputs,
        cases=_cases(),
        cost=_cost,
        implementations={"triton": apply_bitmask.apply_bitmask},
        outputs=_logits,
        exact=True,
    ),
)
