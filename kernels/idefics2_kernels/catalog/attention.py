"""What the rows of the three attentions share.

Names, offsets, the pairs of query and key, and whether there is a Hopper.
"""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from idefics2_kernels.gpu.target import is_hopper

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case_name(*parts: object) -> str:
    """Join ``parts`` to a case's name."""
    return "-".join(str(part) for part in parts).replace("torch.", "").replace(" ", "")


def cumulative(lengths: Iterable[int], device: torch.device) -> Tensor:
    """Turn lengths (B) into offsets (B + 1,) int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _seen_to_one_side(length: int, reach: int) -> int:
    """Sum min(i, ``reach``) over i < ``length``: the keys that queries see before their own."""
    inside = min(reach, length - 1)
    return inside * (inside + 1) // 2 + (length - 1 - inside) * inside if length else 0


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """Count the pairs of query and key that see each other."""
    one_side = _seen_to_one_side(length, length if window is None else window - 1)
    return length + (1 if causal else 2) * one_side


def on_hopper() -> bool:
    """Return whether kernels are compiled, for Hopper."""
    try:
        return is_hopper()
    except RuntimeError:  # no GPU to compile for
        return False
