"""The operations that the patched modules of one model call, and when they are not called."""

import logging

import torch
from torch import Tensor, nn

from idefics2_kernels import REFERENCE, TRITON, Ops

_log = logging.getLogger(__name__)

GRADIENTS = "needs gradients"
AUTOCAST = "runs under torch.autocast"
COMPILED = "is compiled by torch.compile"
MIXED = "mixes dtypes"


class Operations:
    """The choice of operations that all patched modules of one model share.

    Args:
        ops: The operations. If ``None``, ``TRITON`` for tensors on CUDA and ``REFERENCE`` for
            others, so that a model can be moved after it was loaded.
    """

    def __init__(self, ops: Ops | None = None) -> None:
        self._ops = ops
        self._logged: set[str] = set()

    def for_call(self, *tensors: Tensor, module: nn.Module | None = None) -> Ops | None:
        """Return the operations for ``tensors``, or ``None`` where transformers' own must run.

        They must run if gradients are needed, for ``tensors`` or for a parameter of ``module``,
        under autocast, while ``torch.compile`` traces, and if ``tensors`` differ in dtype. The
        first time that a model meets one of these, the log says so.
        """
        reason = self._obstacle(tensors, module)
        if reason is None:
            return self.on(tensors[0].device)
        # The log has locks, which cannot be traced
        if reason != COMPILED and reason not in self._logged:
            self._logged.add(reason)
            _log.warning("A forward that %s uses transformers' own operations", reason)
        return None

    def on(self, device: torch.device) -> Ops:
        """Return the operations for tensors on ``device``."""
        return self._ops or (TRITON if device.type == "cuda" else REFERENCE)

    @staticmethod
    def _obstacle(tensors: tuple[Tensor, ...], module: nn.Module | None) -> str | None:
        if torch.compiler.is_compiling():
            return COMPILED
        if torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in tensors)
            or (module is not None and any(p.requires_grad for p in module.parameters()))
        ):
            return GRADIENTS
        first = tensors[0]
        if torch.is_autocast_enabled(first.device.type):
            return AUTOCAST
        if any(tensor.dtype != first.dtype for tensor in tensors):
            return MIXED
        return None


# Of modules that call the attention but belong to no patched model
_DEFAULT = Operations()


def operations_of(module: nn.Module) -> Operations:
    """Return the operations that ``set_operations`` gave to ``module``, or the default ones."""
    found = module.__dict__.get("idefics2_operations", _DEFAULT)
    assert isinstance(found, Operations)
    return found


def set_operations(module: nn.Module, operations: Operations) -> None:
    """Let ``module`` call ``operations``."""
    module.__dict__["idefics2_operations"] = operations
