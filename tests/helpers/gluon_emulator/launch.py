"""Launches: programs one after another, with a thread for each warp group."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gluon_emulator.pointers import Pointer
from gluon_emulator.program import state
from gluon_emulator.tma import CopyEngine


class Kernel:
    """A jitted function: a plain function when called, a kernel when launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int, maxnreg: int = 0, launch_pdl: bool = False, **kwargs: Any
        ) -> None:
            assert num_warps in (1, 2, 4, 8, 16)
            assert maxnreg % 8 == 0
            assert launch_pdl == kwargs.get("IS_DEPENDENT", False)
            if launch_pdl:
                # Programs run one after another, so none depends on one that runs
                kwargs["IS_DEPENDENT"] = False
            args = tuple(Pointer(a) if isinstance(a, Tensor) else a for a in args)
            # In this order a program's writes into the next one's memory are not overwritten
            for program in reversed(range(grid[0])):
                state.program, state.programs = program, grid[0]
                state.copies = CopyEngine(program)
                state.pieces, state.groups, state.group = [], [], []
                state.words = None
                try:
                    self.function(*args, **kwargs)
                finally:
                    state.copies.end()

        return launch


def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    here = dict(vars(state))
    failures: list[BaseException] = []

    def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
        vars(state).update(here)
        state.products, state.stores = [], []
        try:
            function(*args)
            assert not state.products, "a product that was never waited for"
            assert not state.stores, "a store that was never waited for"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def jit(function: Any = None, **_options: Any) -> Any:
    return Kernel if function is None else Kernel(function)
