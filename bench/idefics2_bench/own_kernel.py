"""A kernel of yours beside ours: it is checked on the catalog's cases, then timed.

idefics2 bench kernels --mine my_kernels:flash_attention --kernel flash_attention
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from idefics2_bench.results.chart_looks import MINE
from idefics2_engine.errors import Idefics2Error
from idefics2_kernels.catalog import CATALOG, Case, KernelSpec
from idefics2_kernels.catalog.criterion import case_error

_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Check:
    """The result of a case.

    Attributes:
        case: The case.
        verdict: ``unsupported`` if the function raised ``NotImplementedError``, ``failed`` if it
            raised anything else.
        error: The error as a share of the allowed error, which is 1. Infinite where the result has
            NaN or another shape or dtype.
        problem: What was raised.
        trace: Where it was raised.
    """

    case: Case
    verdict: Literal["right", "wrong", "unsupported", "failed"]
    error: float = 0.0
    problem: str = ""
    trace: str = ""


def load_function(name: str) -> Callable[..., Any]:
    """Import the function ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``.

    The current folder is among those that are searched.

    Raises:
        Idefics2Error: There is no such function, or importing its module raised an error.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise Idefics2Error(f"--mine must be MODULE:FUNCTION or FILE.py:FUNCTION, got {name!r}")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    # A user's module may raise anything
    except Exception as error:
        raise Idefics2Error(f"--mine: {place} cannot be imported: {_described(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise Idefics2Error(f"--mine: {place} must have a function {function!r}, got none")
    return found  # type: ignore[no-any-return]


def with_mine(kernel: str, function: Callable[..., Any]) -> KernelSpec:
    """Return the catalog's row of operation ``kernel`` with ``function`` as its first implementation.

    Raises:
        Idefics2Error: There is no such operation.
    """
    for spec in CATALOG:
        if spec.name == kernel:
            return replace(spec, implementations={MINE: function, **spec.implementations})
    names = ", ".join(spec.name for spec in CATALOG)
    raise Idefics2Error(f"--kernel must be one of {names}, got {kernel!r}")


def check(spec: KernelSpec, cases: Iterable[Case], device: torch.device) -> Iterable[Check]:
    """Yield the check of each case of ``spec``'s own implementation."""
    for case in cases:
        torch.manual_seed(0)
        inputs = spec.make_inputs(case, device)
        try:
            error = case_error(spec, MINE, case, inputs)
        except NotImplementedError as refusal:
            yield Check(case, "unsupported", problem=_described(refusal))
        # A user's function may raise anything, and the other cases still count
        except Exception as problem:
            trace = "".join(traceback.format_exception(problem))
            yield Check(case, "failed", problem=_described(problem), trace=trace)
        else:
            yield Check(case, "right" if error <= 1 else "wrong", error)


def print_checks(
    spec: KernelSpec, name: str, case_names: Sequence[str] | None, has_gpu: bool
) -> list[Check]:
    """Check the function ``name``, print its cases that are not right, and return all checks.

    Args:
        spec: The operation, as from ``with_mine``.
        name: How the function was given.
        case_names: The only cases to check, if given.
        has_gpu: Whether there is a CUDA device. Without one only small cases are checked.

    Raises:
        Idefics2Error: There is no such case.
    """
    where = ("any", "gpu", "model") if has_gpu else ("any",)
    cases = [case for case in spec.cases if case.where in where]
    if not has_gpu and os.environ.get("TRITON_INTERPRET") == "1":
        num_cases = len(cases)
        cases = [case for case in cases if case.dtype is not torch.bfloat16]
        if left_out := num_cases - len(cases):
            print(f"left out: {left_out} cases in bfloat16, which Triton's interpreter gets wrong")
    every = cases
    if case_names:
        cases = [case for case in cases if case.name in case_names]
    missing = sorted({*(case_names or ())} - {case.name for case in cases})
    if missing:
        raise Idefics2Error(
            f"--case: {missing[0]!r} of {spec.name} cannot be checked here; those that can are "
            f"{', '.join(case.name for case in every)}"
        )
    checks = []
    for one in check(spec, cases, torch.device("cuda" if has_gpu else "cpu")):
        checks.append(one)
        if one.verdict != "right":
            print(_line(one), flush=True)
    failed = [one for one in checks if one.verdict == "failed"]
    if failed:
        print(f"The first failure:\n{failed[0].trace}", end="", file=sys.stderr)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if failed and not has_gpu and not is_interpreted:
        print("Without a GPU, Triton kernels run with TRITON_INTERPRET=1", file=sys.stderr)
    verdicts = [one.verdict for one in checks]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(["right", *verdicts]))
    print(f"{name}: {counts} of {len(checks)} cases of {spec.name}", flush=True)
    return checks


def _line(check: Check) -> str:
    head = f"{check.case.name:24} {check.verdict}"
    if check.verdict == "wrong":
        return f"{head}: {check.error:.2f} times the allowed error"
    return f"{head}: {check.problem}"


def _load_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks up the module of a kernel by its name
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> object:
    # The folder is not on the path of an installed command
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MOST_CHARACTERS]
