"""Every kernel of the catalog against its reference, judged row by row against float64."""

import pytest
import torch

from idefics2_kernels.catalog import CATALOG, Case, KernelSpec, gradient_of, missing, rows
from idefics2_kernels.catalog.spec import copy_inputs, widen_inputs
from idefics2_kernels.gradients import TRITON_GRADIENTS
from idefics2_kernels.ops import TRITON
from parity import check


def _ids(value: object) -> str | None:
    if isinstance(value, (Case, KernelSpec)):
        return value.name
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("spec", "implementation", "case"), rows("any"), ids=_ids)
def test_kernel_matches_reference(
    spec: KernelSpec, implementation: str, case: Case, device: torch.device
) -> None:
    check(spec, implementation, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "implementation", "case"), rows("gpu", "model"), ids=_ids)
def test_compiled_kernel_matches_reference(
    spec: KernelSpec, implementation: str, case: Case, device: torch.device
) -> None:
    check(spec, implementation, case, device)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.parametrize(("spec", "implementation", "case"), rows("huge"), ids=_ids)
def test_compiled_kernel_past_two_to_the_31_elements(
    spec: KernelSpec, implementation: str, case: Case, device: torch.device
) -> None:
    check(spec, implementation, case, device)


@pytest.mark.parametrize("spec", CATALOG, ids=_ids)
def test_reference_keeps_float64(spec: KernelSpec, device: torch.device) -> None:
    if spec.exact:
        pytest.skip("exact operations have no rounding")
    narrowed = []
    for case in (case for case in spec.cases if case.where == "any"):
        wide = widen_inputs(spec.make_inputs(case, device))
        single = widen_inputs(wide, torch.float32)
        exact, narrow = spec.expected(copy_inputs(wide)), spec.expected(copy_inputs(single))
        assert all(output.dtype is torch.float64 for output in exact)
        narrowed.append(all(torch.equal(a, b.double()) for a, b in zip(exact, narrow, strict=True)))
    assert not all(narrowed), "float64 in must mean float64 throughout"


def test_catalog_has_every_operation() -> None:
    assert missing() == set()


@pytest.mark.parametrize("spec", CATALOG, ids=_ids)
def test_first_implementation_is_the_one_in_triton(spec: KernelSpec) -> None:
    first = next(iter(spec.implementations.values()))
    if (gradient := gradient_of(spec)) is not None:
        assert first is getattr(TRITON_GRADIENTS, gradient)
    else:
        assert first is getattr(TRITON, spec.name).__wrapped__


@pytest.mark.parametrize("spec", CATALOG, ids=_ids)
def test_catalog_has_enough_cases(spec: KernelSpec) -> None:
    many = "attention" in spec.name or spec.name in ("linear", "nf4_matmul")
    assert sum(case.where == "any" for case in spec.cases) >= 12
    assert len(spec.cases) >= (200 if many else 50)
    assert len({case.name for case in spec.cases}) == len(spec.cases)
