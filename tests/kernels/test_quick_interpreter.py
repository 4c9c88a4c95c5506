"""The interpreter of the tests replaces Triton's names once a launch, and restores them."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics2_kernels.gpu import checks

pytestmark = pytest.mark.skipif(not checks.INTERPRETED, reason="kernels are compiled")


@triton.jit
def _double(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit  # type: ignore[untyped-decorator]
def _double_kernel(x_ptr, fails: tl.constexpr):  # type: ignore[no-untyped-def]
    at = x_ptr + tl.program_id(0)
    for _ in range(3):
        tl.store(at, _double(tl.load(at)))
    tl.static_assert(not fails)


def doubled(count: int) -> Tensor:
    x = torch.arange(count, dtype=torch.int32)
    _double_kernel[(count,)](x, fails=False)
    return x


def test_number_of_calls_changes_no_number_of_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    replace = triton.runtime.interpreter._patch_builtin

    def count(package: object, *args: object) -> None:
        replaced.append(package)
        replace(package, *args)

    monkeypatch.setattr("triton.runtime.interpreter._patch_builtin", count)
    assert doubled(1).tolist() == [0]
    one = len(replaced)
    assert doubled(5).tolist() == [0, 8, 16, 24, 32]
    assert len(replaced) == 2 * one > 0


def test_names_are_restored_after_a_launch_and_after_an_error() -> None:
    names = tl.load, tl.static_assert, tl.tensor.__add__
    doubled(2)
    assert (tl.load, tl.static_assert, tl.tensor.__add__) == names
    with pytest.raises(triton.runtime.errors.InterpreterError):
        _double_kernel[(2,)](torch.zeros(2, dtype=torch.int32), fails=True)
    assert (tl.load, tl.static_assert, tl.tensor.__add__) == names
    assert doubled(2).tolist() == [0, 8]
