"""Products of the tensor cores, which are computed when they are waited for."""

import time
from typing import Any

import numpy as np

from gluon_emulator.program import state
from gluon_emulator.registers import Array, as_array
from gluon_emulator.shared_memory import Shared


class Product:
    """A product that was issued and is computed when it is waited for."""

    type = Array.type

    def __init__(self, a: Any, b: Any, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Array | None = None
        state.products.append(self)

    def finish(self) -> None:
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        a, b = (x.values if isinstance(x, Shared) else x for x in (self.a, self.b))
        self.value = as_array(a @ b + acc)


def warpgroup_mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    assert is_async
    return Product(a, b, acc if use_acc else 0.0)


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    # A copy that is not waited for gets the time to arrive first
    time.sleep(1e-3)
    while len(state.products) > outstanding:
        state.products.pop(0).finish()
    values = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    assert all(value is not None for value in values), "a result that was not waited for"
    return values[0] if len(values) == 1 else values


def mma(a: Any, b: Any, acc: Any) -> Array:
    # Rows that do not exist may be multiplied by infinite weights
    with np.errstate(invalid="ignore"):
        return as_array(a @ b + acc)
