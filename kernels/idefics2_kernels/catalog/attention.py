"""Helpers of the three attentions' rows: names, offsets, visible pairs, detection of Hopper."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from idefics2_kernels.gpu.target import is_hopper

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case_name(*parts: object) -> str:
    """Join ``parts`` into the name of a case."""
    return "-".join(str(part) for part in parts).replace("torch.", "").replace(" ", "")


def cumulative(lengths: Iterable[int], device: torch.device) -> Tensor:
    """Convert ``lengths`` (B,) into offsets (B + 1,) int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _seen_to_one_side(length: int, reach: int) -> int:
    """Count the keys that queries see before their own: the sum of min(i, ``reach``)."""
    inside = min(reach, length - 1)
    return inside * (inside + 1) // 2 + (length - 1 - inside) * inside if length else 0


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """Count the pairs of a query and a key that it sees, in a sequence of ``length``."""
    one_side = _seen_to_one_side(length, length if window is None else window - 1)
    return length + (1 if causal else 2) * one_side


def on_hopper() -> bool:
    """Return whether kernels are compiled for Hopper."""
    try:
        return is_hopper()
    # Triton raises it where there is no GPU to compile for.
    except RuntimeError:
        return False
