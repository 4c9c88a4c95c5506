"""Rows of the catalog: rotary positions, alone and with the cache."""

import torch
from torch import Tensor

from idefics2_kernels import rotary
from idefics2_kernels.catalog.layouts import LAYOUTS, arrange, normal
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec, Outputs

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ANY = ((1, 4, 2, 64), (5, 4, 2, 72), (3, 6, 2, 96), (4, 8, 8, 128), (7, 3, 1, 6), (0, 4, 2, 64))
_GPU = (
    (1, 32, 8, 128),
    (257, 32, 8, 128),
    (101, 16, 16, 72),
    (37, 16, 4, 96),
    (63, 17, 1, 64),
    (64, 15, 5, 128),
    (1031, 1, 1, 128),
)
_PAGE_SIZE = 4


def _named(T: int, H: int, H_KV: int, D: int) -> dict[str, int]:
    return {"T": T, "H": H, "H_KV": H_KV, "D": D}


def rotary_cases() -> tuple[Case, ...]:
    """Return the cases of a rotation."""
    cases = [
        Case("-".join(map(str, (*sizes, dtype))).replace("torch.", ""), _named(*sizes), dtype)
        for sizes in _ANY
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases += [
        Case(layout, {**_named(5, 4, 2, 64), "layout": layout})
        for layout in (*LAYOUTS[1:], "fused")
    ]
    cases += [
        Case("tiny", {**_named(3, 4, 2, 64), "scale": 1e-4}),
        Case("large", {**_named(3, 4, 2, 64), "scale": 100.0}),
        Case("half-table", {**_named(3, 4, 2, 64), "table": torch.bfloat16}, torch.bfloat16),
        Case("int32", {**_named(3, 4, 2, 64), "integers": torch.int32}),
    ]
    cases += [
        Case(
            "-".join(map(str, ("gpu", *sizes, layout, dtype))).replace("torch.", ""),
            {**_named(*sizes), "layout": layout},
            dtype,
            "gpu",
        )
        for sizes in _GPU
        for layout in ("plain", "fused")
        for dtype in _FLOATS
    ]
    cases += [Case("gpu-far", {**_named(3, 2, 1, 64), "layout": "far"}, where="huge")]
    cases += [
        Case(name, {**_named(T, 32, 8, 128), "layout": "fused"}, torch.bfloat16, "model")
        for name, T in (("8192", 8192), ("decode-b1", 1), ("decode-b64", 64))
    ]
    return tuple(cases)


def _heads(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v, as three tensors or as slices of one fused projection."""
    T, H, H_KV, D = (case.dims[name] for name in ("T", "H", "H_KV", "D"))
    layout, scale = case.dims.get("layout", "plain"), case.dims.get("scale", 1.0)
    if layout == "fused":
        drawn = normal(T, H + 2 * H_KV, D, dtype=case.dtype, device=device, scale=scale)
        q, k, v = drawn.split((H, H_KV, H_KV), dim=1)
        return q, k, v
    q, k, v = (
        normal(T, heads, D, dtype=case.dtype, device=device, layout=layout, scale=scale)
        for heads in (H, H_KV, H_KV)
    )
    return q, k, v


def rotary_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the arguments of ``rotary``."""
    T, D = case.dims["T"], case.dims["D"]
    q, k, _ = _heads(case, device)
    return {"q": q, "k": k, **_positions(case, T, D, device)}


def _positions(case: Case, T: int, D: int, device: torch.device) -> Inputs:
    """Draw ``T`` positions over a whole table; the first is the table's last row."""
    rows = max(4 * T, 1000)
    inverse = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    angles = torch.arange(rows, device=device)[:, None] * inverse
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(case.dims.get("table", torch.float32))
    positions = torch.randint(rows, (T,), device=device)
    positions[:1] = rows - 1
    return {"positions": positions.to(case.dims.get("integers", torch.int64)), "cos_sin": cos_sin}


def _rotary_and_cache_inputs(case: Case, device: torch.device) -> Inputs:
    T, H_KV, D = (case.dims[name] for name in ("T", "H_KV", "D"))
    q, k, v = _heads(case, device)
    page_size = 64 if case.where == "model" else _PAGE_SIZE
    pages = T // page_size + 3
    slots = 1 + torch.randperm(pages * page_size - 1, device=device)[:T]
    # Slot 0 is a valid slot, not padding.
    slots[:1] = 0
    if case.where != "model":
        # Negative slots are padding.
        slots[2::3] = -1
        slots[4::6] = -(2**20)
    # The caches hold numbers that differ from place to place and from every rotated key, so that
    # any wrong write is noticed.
    caches = 1000 + torch.arange(2 * pages * H_KV * page_size * D, device=device) % 999
    k_cache, v_cache = caches.to(case.dtype).view(2, pages, H_KV, page_size, D)
    if case.dims.get("layout") in ("sliced", "offset", "transposed"):
        v_cache = arrange(v_cache, case.dims["layout"])
    return {
        "q": q,
        "k": k,
        "v": v,
        **_positions(case, T, D, device),
        "k_cache": k_cache.clone(),
        "v_cache": v_cache,
        "slots": slots.to(case.dims.get("integers", torch.int64)),
    }


def _result_and_caches(inputs: Inputs, result: Tensor) -> Outputs:
    return result, inputs["k_cache"], inputs["v_cache"]


def rotary_cost(case: Case, copied_heads: int) -> Cost:
    """Return the cost of a rotation and of ``copied_heads`` copies of the key heads."""
    T, H, H_KV, D = (case.dims[name] for name in ("T", "H", "H_KV", "D"))
    rotated = T * (H + H_KV) * D
    moved = 2 * (rotated + T * copied_heads * H_KV * D) * case.dtype.itemsize
    return Cost(bytes=moved + T * (4 * D + 8 * (1 + copied_heads)), flops=3 * rotated)


ROTARY = (
    KernelSpec(
        name="rotary",
        make_inputs=rotary_inputs,
        cases=rotary_cases(),
        cost=lambda case: rotary_cost(case, copied_heads=0),
        implementations={"triton": rotary.rotary},
    ),
    KernelSpec(
        name="rotary_and_cache",
        make_inputs=_rotary_and_cache_inputs,
        cases=rotary_cases(),
        cost=lambda case: rotary_cost(case, copied_heads=1),
        implementations={"triton": rotary.rotary_and_cache},
        outputs=_result_and_caches,
    ),
)
