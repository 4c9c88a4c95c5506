"""Every kernel with the inputs, cases and cost that its tests, benchmark and docs share."""

from dataclasses import fields

from idefics2_kernels.catalog.activation import ACTIVATIONS
from idefics2_kernels.catalog.apply_bitmask import APPLY_BITMASK
from idefics2_kernels.catalog.backward import GRADIENT_CATALOG
from idefics2_kernels.catalog.flash_attention import FLASH_ATTENTION
from idefics2_kernels.catalog.lora_linear import LORA_LINEAR
from idefics2_kernels.catalog.norms import NORMS
from idefics2_kernels.catalog.paged_attention import PAGED_ATTENTION
from idefics2_kernels.catalog.patches import PATCHES
from idefics2_kernels.catalog.perceiver_attention import PERCEIVER_ATTENTION
from idefics2_kernels.catalog.products import PRODUCTS
from idefics2_kernels.catalog.rotary import ROTARY
from idefics2_kernels.catalog.sample import SAMPLE
from idefics2_kernels.catalog.spec import Case, Cost, Inputs, KernelSpec, Where
from idefics2_kernels.gradients import triton_gradients
from idefics2_kernels.ops import Ops

__all__ = ["CATALOG", "Case", "Cost", "Inputs", "KernelSpec", "gradient_of", "missing", "rows"]

CATALOG: tuple[KernelSpec, ...] = (
    FLASH_ATTENTION,
    PAGED_ATTENTION,
    PERCEIVER_ATTENTION,
    *PRODUCTS,
    LORA_LINEAR,
    *NORMS,
    *ACTIVATIONS,
    *ROTARY,
    *PATCHES,
    *APPLY_BITMASK,
    *SAMPLE,
    *GRADIENT_CATALOG,
)


def rows(*where: Where) -> list[tuple[KernelSpec, str, Case]]:
    """Return each kernel's implementations with the cases for ``where`` that they run here."""
    return [
        (spec, implementation, case)
        for spec in CATALOG
        for implementation in spec.implementations
        for case in spec.cases
        if case.where in where and spec.only.get(implementation, _every)(case)
    ]


def _every(_case: Case) -> bool:
    return True


def gradient_of(spec: KernelSpec) -> str | None:
    """Return the field of ``Gradients`` that ``spec`` covers, or ``None`` for an operation."""
    name = spec.name.removesuffix("_backward")
    return name if name != spec.name or name not in {field.name for field in fields(Ops)} else None


def missing() -> set[str]:
    """Return the operations and the gradients with a kernel that no row covers.

    A test requires that there are none.
    """
    gradients = set(triton_gradients()) - {gradient_of(spec) for spec in CATALOG}
    return gradients | {field.name for field in fields(Ops)} - {spec.name for spec in CATALOG}
