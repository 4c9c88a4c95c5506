"""Row of the catalog: pixels to patches."""

from typing import Any

import torch

from idefics2_kernels import patches
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Mean and standard deviation by the number of channels.
_CHANNELS = {
    1: ((0.45,), (0.22,)),
    3: ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7)),
    4: ((0.5, 0.4, 0.3, 0.0), (0.5, 0.6, 0.7, 1.0)),
}
# Rows and columns of patches of each image.
_Grids = tuple[tuple[int, int], ...]
_ANY: tuple[tuple[str, _Grids, int, int], ...] = (
    ("one-patch", ((1, 1),), 14, 3),
    ("one-row", ((1, 5),), 14, 3),
    ("one-column", ((17, 1),), 3, 3),
    ("mixed", ((2, 4), (1, 1), (5, 2)), 14, 3),
    ("empty-images", ((0, 3), (2, 3), (0, 1), (0, 2), (3, 2), (0, 4)), 5, 3),
    ("many-images", tuple((1 + i % 3, 1 + i % 2) for i in range(11)), 4, 3),
    ("gray", ((3, 2), (2, 3)), 8, 1),
    ("four-channels", ((2, 3),), 7, 4),
    ("no-patch", ((0, 1),), 14, 3),
    ("one-pixel", ((3, 6), (2, 2)), 1, 3),
)
_GPU: tuple[tuple[str, _Grids, int, int], ...] = (
    ("gpu-mixed", ((70, 70), (1, 1), (35, 53), (69, 17), (3, 64)), 14, 3),
    ("gpu-one", ((70, 70),), 14, 3),
    ("gpu-100-images", tuple((1 + i % 7, 1 + i % 11) for i in range(101)), 14, 3),
    ("gpu-sixteen", ((31, 33), (13, 29)), 16, 3),
    ("gpu-eight", ((31, 33), (0, 5), (13, 29)), 8, 3),
    ("gpu-gray", ((31, 33), (13, 29)), 14, 1),
    ("gpu-four-channels", ((31, 33), (13, 29)), 14, 4),
)


def _cases() -> tuple[Case, ...]:
    cases = [
        Case(
            f"{name}-{dtype}".replace("torch.", ""),
            {"grids": grids, "patch_size": size, "channels": channels},
            dtype,
            "gpu" if name.startswith("gpu") or dtype is torch.float16 else "any",
        )
        for name, grids, size, channels in (*_ANY, *_GPU)
        for dtype in _FLOATS
    ]
    cases += [
        Case(
            name,
            {"grids": ((rows, columns),) * images, "patch_size": 14, "channels": 3},
            torch.bfloat16,
            "model",
        )
        for name, images, rows, columns in (("980-b1", 1, 70, 70), ("980-b8", 8, 70, 70))
    ]
    return tuple(cases)


def _inputs(case: Case, device: torch.device) -> Inputs:
    size, channels = case.dims["patch_size"], case.dims["channels"]
    counts = [rows * columns for rows, columns in case.dims["grids"]]
    mean, std = _CHANNELS[channels]
    shape = (sum(counts) * size**2 * channels,)
    return {
        "pixels": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "cu_seqlens": torch.tensor([0, *counts], device=device).cumsum(0).int(),
        "widths": torch.tensor([columns for _, columns in case.dims["grids"]], device=device),
        "patch_size": size,
        "rescale_factor": 1 / 255,
        "mean": mean,
        "std": std,
        "dtype": case.dtype,
    }


def _cost(case: Case) -> Cost:
    dims: Any = case.dims
    values = sum(rows * columns for rows, columns in dims["grids"])
    values *= dims["patch_size"] ** 2 * dims["channels"]
    return Cost(bytes=values * (1 + case.dtype.itemsize), flops=3 * values)


PATCHES = (
    KernelSpec(
        name="patches",
        make_inputs=_inputs,
        cases=_cases(),
        cost=_cost,
        implementations={"triton": patches.patches},
    ),
)
