"""A Triton kernel with a planted fault is named at its stage, and by the search as the operation.

The faults are those of ``tests/mutations``.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.parity import Comparison, compare
from idefics2_engine.parity.inner_stages import stages_of
from idefics2_engine.parity.inputs import Case
from idefics2_engine.parity.search.bisection import Explanation
from idefics2_kernels import ROW_BY_ROW, TRITON, Ops
from mutants import PACKAGE, mutations
from parity_recordings import TOKENS, first_stage, record_path

TEXT = [Case.raw("a")]
LAYER = "text layer 0"
# Of a fault: the operation that has it, and the stage where it shows
FAULTS: dict[str, tuple[str, str]] = {
    "activation: gate and up swapped": ("silu_mul", "text layer 0 mlp"),
    "norms/rms_norm: norm of x, not of the sum": ("add_rms_norm", "text layer 0 mlp norm"),
    # Index and position of a token differ only after the prompt
    "rotary: index for position": ("rotary_and_cache", "text layer 0 attention"),
}


@pytest.fixture(scope="module")
def theirs_inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record transformers on a short text, with the stages inside the first text layer."""
    pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("parity") / "theirs"
    record_path("transformers", folder, cases=TEXT, order=stages_of(DEMO_MODEL, [LAYER]))
    return folder


def compare_inside(theirs: Path, device: torch.device, ops: Ops, **settings: Any) -> Comparison:
    """Compare ``ops`` in fp32 on the device of the kernels, also inside the first text layer."""
    return compare(
        "ours:fp32",
        str(theirs),
        cases=TEXT,
        device=device.type,
        max_tokens=TOKENS,
        ops=ops,
        inside=[LAYER],
        **settings,
    )


def mutated(fault: str, folder: Path) -> ModuleType:
    """Import a kernel file with one of its faults."""
    file, _, name = fault.partition(": ")
    (mutation,) = (one for one in mutations([Path(file).name]) if one.name == name)
    (copy := folder / f"{file}.py").parent.mkdir(parents=True, exist_ok=True)
    copy.write_text((PACKAGE / f"{file}.py").read_text(encoding="utf-8"), encoding="utf-8")
    mutation.apply(folder)
    spec = importlib.util.spec_from_file_location(f"mutated_{copy.stem}", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_mutated_kernel_is_named(
    fault: str, theirs_inside: Path, tmp_path: Path, device: torch.device
) -> None:
    operation, stage = FAULTS[fault]
    kernel = getattr(mutated(fault, tmp_path), operation)
    ops = replace(ROW_BY_ROW, **{operation: kernel})
    found = compare_inside(theirs_inside, device, ops, bisect=True)
    assert first_stage(found) == stage
    assert found.bisection is not None
    assert found.bisection.explanations == (Explanation(stage, (operation,)),)


@pytest.mark.parametrize("operation", sorted({operation for operation, _ in FAULTS.values()}))
def test_right_kernel_is_within_rounding(
    operation: str, theirs_inside: Path, device: torch.device
) -> None:
    ops = replace(ROW_BY_ROW, **{operation: getattr(TRITON, operation)})
    found = compare_inside(theirs_inside, device, ops)
    assert found.within_rounding
