"""What the catalog says of an operation: inputs, cases, implementations and cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from idefics2_kernels.ops import REFERENCE

Where = Literal["any", "gpu", "huge", "model"]
Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One set of sizes.

    ``where`` says what it is for: ``"any"`` is small enough for the interpreter and runs
    everywhere, ``"gpu"`` runs compiled only, ``"huge"`` too, alone, as it has offsets past 2^31
    elements, ``"model"`` is a shape of the model's own: compiled for GPUs that are not there,
    checked and timed on one that is.
    """

    name: str
    dims: Mapping[str, Any]
    dtype: torch.dtype = torch.float16
    where: Where = "any"


@dataclass(frozen=True)
class Cost:
    """What one call must move and compute: each input read once, each output written once."""

    bytes: int
    flops: int


def as_tuple(_inputs: Inputs, result: Any) -> Outputs:
    """Return what an operation returned as a tuple of tensors."""
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class KernelSpec:
    """A row of the catalog.

    Attributes:
        name: The field of ``Ops``.
        make_inputs: Draws the arguments of a case on a device; may use torch's global generator
            only.
        cases: What it is tested and timed on.
        cost: For the roofline.
        implementations: Kernels by name, the first being what ``TRITON`` holds.
        only: For those that are not for every case, whether one runs a case on the GPU compiled
            for.
        outputs: All that a call gives, of the arguments after it and its result: an operation may
            write in place.
        exact: Whether outputs must equal the reference's, bit for bit.
        checked_rows: For cases too large to check whole: places along the first axis of every
            output, or ``None``.
        reference: What computes the truth, by default the field of ``REFERENCE``; with
            ``checked_rows`` it gets them as the argument ``rows`` and returns only those.
    """

    name: str
    make_inputs: Callable[[Case, torch.device], Inputs]
    cases: tuple[Case, ...]
    cost: Callable[[Case], Cost]
    implementations: Mapping[str, Callable[..., Any]]
    outputs: Callable[[Inputs, Any], Outputs] = as_tuple
    exact: bool = False
    checked_rows: Callable[[Case, Inputs], Tensor | None] = field(
        default=lambda _case, _inputs: None
    )
    reference: Callable[..., Any] | None = None
    only: Mapping[str, Callable[[Case], bool]] = field(default_factory=dict)

    def run(self, implementation: Callable[..., Any], inputs: Inputs) -> Outputs:
        """Call ``implementation`` on ``inputs``; return everything it gave."""
        return self.outputs(inputs, implementation(**inputs))

    def expected(self, inputs: Inputs, rows: Tensor | None = None) -> Outputs:
        """Return what the reference gives for ``inputs``, whole or at ``rows``."""
        reference = self.reference or getattr(REFERENCE, self.name)
        return self.run(reference, inputs if rows is None else {**inputs, "rows": rows})


def widen_inputs(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
    """Return ``inputs`` with all that is floating-point in ``dtype``, and everything else copied.

    The tensors in a dataclass are the parts of a format and stay as they are: what they stand for
    is exact.
    """
    return {name: _widen(value, dtype) for name, value in inputs.items()}


def copy_inputs(inputs: Inputs) -> Inputs:
    """Return ``inputs`` with tensors of their own, strides kept.

    An operation may write in place.
    """
    return {name: _copy(value) for name, value in inputs.items()}


def _copy(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return replace(value, **copy_inputs(parts))
    if not isinstance(value, Tensor):
        return value
    own = torch.empty(0, dtype=value.dtype, device=value.device)
    storage = value.untyped_storage().clone()
    return own.set_(storage, value.storage_offset(), value.shape, value.stride())


def _widen(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):  # the type an operation is told to return
        return dtype if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype, copy=True)
    return _copy(value)
