"""Row of the catalog: logits to tokens.

The token must equal the reference's. Inputs are drawn again until rounding can change neither the
tokens that top-p keeps nor the token drawn. Counts, distances and the bound of min-p equal the
reference's bit for bit and need no such margin.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import sample
from idefics2_kernels.catalog.layouts import LAYOUTS, arrange
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec
from idefics2_kernels.reference.sampling import filter_scores, philox_uniform

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The distance from a boundary that inputs must keep, as a probability.
_MARGIN = 2.0**-18
_MIXED = {
    "temperature": (1.0, 0.0, 0.6, 1.7, 1.0),
    "top_k": (0, 7, 3, 40, 1, 12, 0),
    "top_p": (0.9, 1.0, 0.5, 0.97),
    "min_p": (0.0, 0.1, 0.02),
}
# The rows of a batch use the values of a parameter in turn.
_FILTERS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "greedy": {"temperature": (0.0,)},
    "plain": {},
    "temperature": {"temperature": (0.01, 0.6, 1.7, 30.0)},
    "top-k": {"top_k": (1, 7, 2, 45, 10**6, 0)},
    "top-p": {"top_p": (0.9, 0.05, 0.5, 0.99, 1.0)},
    "min-p": {"min_p": (0.1, 0.0, 1.0, 0.01)},
    "mixed": _MIXED,
    # The order matters: tokens that min-p removes do not count in the probability of top-p.
    "order": {"min_p": (0.3,), "top_p": (0.7,)},
    "serving": {"temperature": (0.7,), "top_p": (0.9,)},
    "top-k-and-p": {"temperature": (0.7,), "top_k": (50,), "top_p": (0.9,)},
}


def _case(name: str, B: int, V: int, filters: str = "mixed", **options: Any) -> Case:
    dtype, where = options.pop("dtype", torch.float32), options.pop("where", "any")
    return Case(name, {"B": B, "V": V, "filters": filters, **options}, dtype, where)


def _cases() -> tuple[Case, ...]:
    cases = [_case(filters, 6, 50, filters) for filters in _FILTERS if filters != "order"]
    cases += [
        _case("min-p-last", 6, 50, min_p_first=False),
        _case("one-token", 2, 1),
        _case("two-tokens", 6, 2),
        _case("empty", 0, 50),
        _case("order-last", 12, 12, "order", scale=0.8, min_p_first=False),
        _case("two-blocks", 3, 8197),
        _case("two-blocks-plain", 6, 12289, "plain"),
        _case("two-blocks-equal", 2, 8197, "greedy", values="equal"),
        _case("prime", 4, 997, min_p_first=False),
        _case("ties", 8, 64, values="ties"),
        _case("equal", 8, 33, values="equal"),
        _case("barred", 6, 70, values="barred"),
        _case("one-allowed", 3, 70, values="one allowed"),
        _case("large", 2, 50, scale=1000.0),
        _case("tiny", 3, 50, scale=1e-4, integers=torch.int32),
    ]
    cases += [
        _case(f"{layout}-half", 3, 60, layout=layout, dtype=torch.float16)
        for layout in LAYOUTS[1:3]
    ]
    sizes = (1023, 1024, 1025, 8191, 8192, 8193, 32003, 65537)
    cases += [
        _case(
            f"gpu-{V}-{first}-{dtype}".replace("torch.", ""),
            32,
            V,
            min_p_first=first,
            dtype=dtype,
            where="gpu",
        )
        for V in sizes
        for first, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16))
    ]
    cases += [_case(f"gpu-{filters}", 67, 32003, filters, where="gpu") for filters in _FILTERS]
    cases += [
        _case(f"gpu-{values.replace(' ', '-')}", 67, 32003, values=values, where="gpu")
        for values in ("ties", "equal", "barred", "one allowed")
    ]
    cases += [
        _case("gpu-large", 67, 32003, scale=1000.0, where="gpu"),
        _case("gpu-far", 3, 32003, layout="far", dtype=torch.float16, where="huge"),
        _case("b128", 128, 32003, "top-k-and-p", where="model"),
        _case("b64", 64, 32003, "serving", where="model"),
        _case("b1", 1, 32003, "serving", where="model"),
        _case("b64-greedy", 64, 32003, "greedy", where="model"),
    ]
    return tuple(cases)


def _inputs(case: Case, device: torch.device) -> Inputs:
    B, integers = case.dims["B"], case.dims.get("integers", torch.int64)
    filters = _FILTERS[case.dims["filters"]]

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        values = filters.get(name, (default,))
        return torch.tensor([values[b % len(values)] for b in range(B)], dtype=dtype, device=device)

    inputs: Inputs = {
        "logits": _logits(case, device),
        "temperature": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", 0, integers),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "seed": _words(B, device),
        "index": torch.arange(B, device=device) * 2**31,
        "min_p_first": case.dims.get("min_p_first", True),
    }
    for _ in range(100):
        # Tensors on this device have no values.
        if device.type == "meta":
            break
        undecided = ~_decided(inputs)
        if not undecided.any():
            break
        inputs["logits"] = torch.where(undecided[:, None], _logits(case, device), inputs["logits"])
        inputs["seed"] = torch.where(undecided, _words(B, device), inputs["seed"])
    else:
        raise AssertionError(f"{case.name}: no inputs found that rounding cannot decide")
    inputs["logits"] = arrange(inputs["logits"], case.dims.get("layout", "plain"))
    return inputs


def _words(B: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (B,), device=device)


def _logits(case: Case, device: torch.device) -> Tensor:
    B, V = case.dims["B"], case.dims["V"]
    logits = torch.randn(B, V, device=device) * case.dims.get("scale", 2.5)
    values = case.dims.get("values")
    if values == "ties":
        logits = logits.round()
    elif values == "equal":
        logits = torch.full_like(logits, 1.5)
    elif values == "barred":
        logits[torch.rand(B, V, device=device) < 0.8] = float("-inf")
        logits[:, V // 2] = 1.0
    elif values == "one allowed":
        logits[:, torch.arange(V, device=device) != V // 3] = float("-inf")
    drawn: Tensor = logits.to(case.dtype)
    return drawn


def _decided(inputs: Inputs) -> Tensor:
    """Return the rows whose token does not depend on rounding: (B,).

    Such a row's token is the same for every top-p and every random number within the margin.
    """
    top_p: Tensor = inputs["top_p"].double()
    greedy: Tensor = inputs["temperature"] == 0
    decided, tokens = torch.ones_like(greedy), []
    for factor in (1 - _MARGIN, 1.0, 1 + _MARGIN):
        varied = torch.where(top_p < 1, top_p * factor, top_p)
        filters = {name: inputs[name] for name in ("temperature", "top_k", "min_p", "min_p_first")}
        scores = filter_scores(inputs["logits"].double(), top_p=varied, **filters)
        cumulative = scores.softmax(-1).cumsum(-1)
        distance = cumulative - philox_uniform(inputs["seed"], inputs["index"])[:, None]
        tokens.append((distance > 0).int().argmax(-1))
        # The last sum is 1, and the random number is always less.
        distance = distance.masked_fill(cumulative > 1 - _MARGIN / 2, 1.0)
        decided &= distance.abs().amin(-1) > _MARGIN
    decided &= (tokens[0] == tokens[1]) & (tokens[1] == tokens[2])
    return decided | greedy


def _cost(case: Case) -> Cost:
    B, V = case.dims["B"], case.dims["V"]
    parameters = B * (3 * 4 + 3 * 8 + 8)
    return Cost(bytes=B * V * case.dtype.itemsize + parameters, flops=4 * B * V)


SAMPLE = (
    KernelSpec(
        name="sample",
        make_inputs=_inputs,
        cases=_cases(),
        cost=_cost,
        implementations={"triton": sample.sample},
        exact=True,
    ),
)
