"""Cases and cost of operations that work on rows of one tensor: norms and activations."""

from collections.abc import Iterable, Mapping
from itertools import product

import torch

from idefics2_kernels.catalog.layouts import LAYOUTS
from idefics2_kernels.catalog.spec import Case, Cost

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TEXT_ROWS = {"8192": 8192, "decode-b1": 1, "decode-b64": 64}
# 39,200 rows are eight images of 4,900 patches.
VISION_ROWS = {"8192": 8192, "39200": 39200}

Sizes = Iterable[tuple[int, int]]


def rowwise_cases(
    sizes: Sizes,
    magnitudes: Iterable[Case],
    gpu_sizes: Sizes,
    gpu_view: tuple[int, int, int],
    model_n: int,
    model_rows: Mapping[str, int],
) -> tuple[Case, ...]:
    """Return cases by the shape of the output.

    Args:
        sizes: Sizes (M, N) for any machine.
        magnitudes: Cases of tiny and large values.
        gpu_sizes: Sizes (M, N) for a GPU.
        gpu_view: The shape that is tested in each layout on a GPU.
        model_n: The length of the model's rows.
        model_rows: The numbers of the model's rows by the name of the case.
    """
    cases = [
        Case(f"{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype)
        for (M, N), dtype in product(sizes, (torch.float32, torch.bfloat16))
    ]
    cases += [
        Case(layout, {"shape": (3, 5, 72), "layout": layout}, torch.float16) for layout in LAYOUTS
    ]
    cases += magnitudes
    cases += [
        Case(f"gpu-{M}x{N}-{dtype}".replace("torch.", ""), {"shape": (M, N)}, dtype, "gpu")
        for (M, N), dtype in product(gpu_sizes, FLOATS)
    ]
    cases += [
        Case(
            f"gpu-{layout}-{dtype}".replace("torch.", ""),
            {"shape": gpu_view, "layout": layout},
            dtype,
            "gpu",
        )
        for layout, dtype in product(LAYOUTS, FLOATS)
    ]
    cases += [Case("gpu-far", {"shape": (3, 1151), "layout": "far"}, where="huge")]
    cases += [
        Case(name, {"shape": (M, model_n)}, torch.bfloat16, "model")
        for name, M in model_rows.items()
    ]
    return tuple(cases)


def rowwise_cost(case: Case, passes: int, vectors: int, flops: int) -> Cost:
    """Return the cost of ``passes`` over the rows and ``flops`` per element.

    ``vectors`` is the number of additional inputs of a row's length.
    """
    elements, N = torch.Size(case.dims["shape"]).numel(), case.dims["shape"][-1]
    return Cost(
        bytes=(passes * elements + vectors * N) * case.dtype.itemsize, flops=flops * elements
    )
