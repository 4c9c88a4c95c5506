"""The operations of Idefics2: a plain PyTorch definition and a Triton kernel for each."""

from idefics2_kernels.differentiable import differentiable
from idefics2_kernels.gradients import REFERENCE_GRADIENTS, TRITON_GRADIENTS, Gradients
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
    "REFERENCE_GRADIENTS",
    "ROW_BY_ROW",
    "TRITON",
    "TRITON_GRADIENTS",
    "Gradients",
    "MissingOperationError",
    "NF4Weight",
    "NoGradientError",
    "Ops",
    "differentiable",
]
