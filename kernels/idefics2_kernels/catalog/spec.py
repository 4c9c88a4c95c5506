"""The types of the catalog: an operation's inputs, cases, implementations and cost."""

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
    """One set of sizes, and the machines that it runs on.

    The values of ``where``:

    - ``"any"``: small enough for the interpreter, runs everywhere.
    - ``"gpu"``: runs compiled only.
    - ``"huge"``: runs compiled only, and alone, because it has offsets past 2^31 elements.
    - ``"model"``: a shape of the model. It is compiled for several GPUs without having them, and
      checked and timed on a GPU.
    """

    name: str
    dims: Mapping[str, Any]
    dtype: torch.dtype = torch.float16
    where: Where = "any"


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one call, with each input read once and each output written once."""

    bytes: int
    flops: int


def as_tuple(_inputs: Inputs, result: Any) -> Outputs:
    """Return the ``result`` of an operation as a tuple of tensors."""
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class KernelSpec:
    """A row of the catalog: an operation with its cases and implementations.

    Attributes:
        name: The field of ``Ops``, or that of ``Gradients`` with the ending ``_backward``.
        make_inputs: Draws the arguments of a case on a device. Its only source of randomness is
            torch's global generator.
        cases: The cases that are tested and timed.
        cost: The cost of a case, for the roofline.
        implementations: Kernels by name. The first is the one in ``TRITON``.
        only: For implementations that do not support every case, a function that returns whether
            the implementation runs a case on the current target.
        outputs: Returns all outputs of a call from its arguments and its result, because an
            operation may write in place.
        exact: Whether outputs must equal the reference's bit for bit.
        checked_rows: For a case that is too large to check completely, the indices along the first
            axis of every output to check. Otherwise ``None``.
        reference: The reference implementation, by default the field of ``REFERENCE``. If there are
            ``checked_rows``, it receives them as the argument ``rows`` and returns only those.
        terms: For an operation whose results may be zero because terms cancel, a function of the
            same arguments (and of ``rows``) that returns the sums of the terms' absolute values.
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
    terms: Callable[..., Outputs] | None = None

    def run(self, implementation: Callable[..., Any], inputs: Inputs) -> Outputs:
        """Call ``implementation`` on ``inputs`` and return all its outputs."""
        return self.outputs(inputs, implementation(**inputs))

    def expected(self, inputs: Inputs, rows: Tensor | None = None) -> Outputs:
        """Return the reference's outputs for ``inputs``, all of them or only ``rows``."""
        reference = self.reference or getattr(REFERENCE, self.name)
        return self.run(reference, inputs if rows is None else {**inputs, "rows": rows})


def widen_inputs(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
    """Copy ``inputs`` and convert floating-point tensors to ``dtype``.

    Tensors in a dataclass are the parts of a format and keep their dtype, because the numbers that
    they represent are exact.
    """
    return {name: _widen(value, dtype) for name, value in inputs.items()}


def copy_inputs(inputs: Inputs) -> Inputs:
    """Copy ``inputs`` with the strides of tensors. An operation may write to them in place."""
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
    # A dtype among the inputs is that of the result.
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype, copy=True)
    return _copy(value)
