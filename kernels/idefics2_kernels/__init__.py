"""The operations Idefics2 is made of: plain PyTorch to define each, Triton to run it fast."""

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.ops import REFERENCE, TRITON, MissingOperationError, NoGradientError, Ops

__all__ = ["REFERENCE", "TRITON", "MissingOperationError", "NF4Weight", "NoGradientError", "Ops"]
