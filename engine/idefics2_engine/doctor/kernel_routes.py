"""Which implementation computes the model's shapes on the current GPU, asked of the kernels.

It imports torch and Triton. Inputs are meta tensors, which have no memory.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from idefics2_engine.doctor import facts
from idefics2_engine.doctor.model_memory import IDEFICS2_8B
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_kernels.attention import (
    decode_attention,
    flash_attention,
    flash_attention_hopper,
    paged_attention,
    paged_attention_hopper,
    perceiver_attention,
)
from idefics2_kernels.attention.tiles import UNBOUNDED
from idefics2_kernels.catalog import CATALOG, Inputs
from idefics2_kernels.gpu.target import current_arch, is_hopper
from idefics2_kernels.nf4 import (
    nf4_few_rows_hopper,
    nf4_gemv_hopper,
    nf4_many_rows_hopper,
    nf4_matmul,
)

Routes = dict[str, dict[str, int]]
"""For each operation, the number of the catalog's model shapes by ``gluon``, ``plain``, ``none``."""

_META = torch.device("meta")
_BF16_BYTES = 2


def kernel_routes() -> Routes:
    """Return which kernels compute the model's shapes on the current target."""
    if current_arch() < facts.LEAST_CAPABILITY:
        return {spec.name: {"none": _num_model_cases(spec.cases)} for spec in CATALOG}
    routes: Routes = {}
    for spec in CATALOG:
        counts: Counter[str] = Counter()
        for case in spec.cases:
            if case.where == "model":
                has_gluon = spec.name in _SUPPORTS and is_hopper()
                inputs = spec.make_inputs(case, _META) if has_gluon else {}
                is_gluon = has_gluon and _SUPPORTS[spec.name](inputs)
                counts["gluon" if is_gluon else "plain"] += 1
        routes[spec.name] = dict(counts)
    return routes


def launch_configs(arch: int) -> dict[str, dict[str, Any]]:
    """Return the launch options of the attentions and of NF4 products at the 8B model's shapes."""
    vision, perceiver, text = IDEFICS2_8B.vision, IDEFICS2_8B.perceiver, IDEFICS2_8B.text
    groups = text.num_heads // text.num_kv_heads
    configs: dict[str, Any] = {
        "flash_attention, vision": flash_attention.launch_config(
            vision.head_dim, _BF16_BYTES, arch
        ),
        "flash_attention, text": flash_attention.launch_config(text.head_dim, _BF16_BYTES, arch),
        "perceiver_attention": perceiver_attention.launch_config(
            perceiver.head_dim, _BF16_BYTES, arch
        ),
        "paged_attention, chunk of 512": paged_attention.launch_config(
            512 * groups, text.head_dim, PAGE_SIZE, _BF16_BYTES, arch
        ),
        "paged_attention, decode": decode_attention.launch_config(
            groups, text.head_dim, PAGE_SIZE, _BF16_BYTES, arch, is_split=True
        ),
        "nf4_matmul, 128 rows": nf4_matmul.launch_config(128, text.hidden_size, _BF16_BYTES, arch),
    }
    return {name: asdict(config) for name, config in configs.items()}


def summary(routes: Routes) -> str:
    """Return the routes in a few words."""
    by_kind: dict[str, list[str]] = {}
    for name, counts in routes.items():
        kind = next((kind for kind in ("none", "gluon") if counts.get(kind)), "plain")
        by_kind.setdefault(kind, []).append(name)
    parts = []
    if "gluon" in by_kind:
        parts.append(f"Gluon in {', '.join(by_kind['gluon'])}")
    if "plain" in by_kind:
        parts.append(f"plain Triton in {len(by_kind['plain'])} operations")
    if "none" in by_kind:
        parts.append(f"none for {len(by_kind['none'])} operations")
    return "; ".join(parts)


def _num_model_cases(cases: tuple[Any, ...]) -> int:
    return sum(case.where == "model" for case in cases)


def _flash(inputs: Inputs) -> bool:
    return flash_attention_hopper.supports(inputs["q"], inputs["k"], inputs["v"])


def _paged(inputs: Inputs) -> bool:
    q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    # Decoding has a kernel of its own
    if inputs["max_seqlen"] == 1:
        return False
    left = UNBOUNDED if inputs["window"] is None else inputs["window"] - 1
    return paged_attention_hopper.supports(q, k_cache, v_cache, left)


def _nf4(inputs: Inputs) -> bool:
    rows, weight = inputs["x"].flatten(0, -2), inputs["weight"]
    return any(
        kernel.supports(rows, weight)
        for kernel in (nf4_gemv_hopper, nf4_few_rows_hopper, nf4_many_rows_hopper)
    )


# The operations that have Gluon kernels, and whether one of these supports a call
_SUPPORTS: dict[str, Callable[[Inputs], bool]] = {
    "flash_attention": _flash,
    "paged_attention": _paged,
    "nf4_matmul": _nf4,
}
