"""The operations of Idefics2: a plain PyTorch definition and a Triton kernel for each."""

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.ops import (
    REFERENCE,
    ROW_BY_ROW,
    TRITON,
    MissingOperationError,
    NoGradientError,
    Ops,
)

__all__ = [
    "REFERENCE",
    "ROW_BY_ROW",
    "TRITON",
    "MissingOperationError",
    "NF4Weight",
    "NoGradientError",
    "Ops",
]
