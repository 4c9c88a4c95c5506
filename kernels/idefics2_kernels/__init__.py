"""The operations Idefics2 is made of: plain PyTorch to define each, Triton to run it fast."""

from idefics2_kernels.ops import REFERENCE, TRITON, MissingOperationError, Ops

__all__ = ["REFERENCE", "TRITON", "MissingOperationError", "Ops"]
