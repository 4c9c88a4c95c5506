"""Import a kernel file with this package instead of Gluon."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import idefics2_kernels
from gluon_emulator.launch import jit, warp_specialize
from gluon_emulator.pointers import atomic_add, commit_group, copy_later, load, store, wait_group
from gluon_emulator.products import mma, warpgroup_mma, warpgroup_mma_wait
from gluon_emulator.program import state
from gluon_emulator.ptx import run_asm
from gluon_emulator.registers import Array, as_array, split
from gluon_emulator.shared_memory import Shared, allocate
from gluon_emulator.tma import Descriptor, load_tile, store_wait


def _no_layout(*_args: object, **_options: object) -> None:
    pass


def _modules() -> dict[str, Any]:
    """Return the replacements of Gluon's modules."""
    gl: Any = types.ModuleType("gl")
    gl.constexpr = lambda value: value
    gl.int64, gl.float32, gl.int32, gl.uint16 = "int64", "float32", "int32", "uint16"
    gl.float16, gl.bfloat16 = torch.float16, torch.bfloat16
    gl.program_id = lambda _axis: state.program
    gl.num_programs = lambda _axis: state.programs
    gl.load, gl.store, gl.atomic_add = load, store, atomic_add
    gl.static_range = range
    gl.minimum, gl.maximum = np.minimum, np.maximum
    # The hardware rounds to zero as well
    gl.cdiv = lambda a, b: int((a + b - 1) / b)
    gl.cast = lambda value, _dtype: value
    gl.where, gl.exp2 = np.where, np.exp2
    gl.max, gl.sum = np.max, np.sum
    gl.split = split
    gl.join = lambda a, b: np.stack([a, b], axis=-1).view(Array)
    gl.permute, gl.reshape, gl.broadcast = np.transpose, np.reshape, np.broadcast_arrays
    gl.inline_asm_elementwise = run_asm
    gl.arange = lambda begin, end, _layout: np.arange(begin, end).view(Array)
    gl.full = lambda shape, value, _dtype, _layout: as_array(np.full(shape, value))
    gl.zeros = lambda shape, _dtype, _layout: as_array(np.zeros(shape))
    gl.convert_layout = lambda value, _layout: value
    gl.NVMMADistributedLayout = gl.DotOperandLayout = gl.SliceLayout = _no_layout
    gl.DistributedLinearLayout = gl.BlockedLayout = gl.SwizzledSharedLayout = _no_layout
    gl.NVMMASharedLayout = _no_layout
    gl.allocate_shared_memory = allocate
    gl.shared_memory_descriptor = Shared
    gl.warp_specialize = warp_specialize
    gluon: Any = types.ModuleType("gluon")
    gluon.jit, gluon.language = jit, gl
    hopper: Any = types.ModuleType("hopper")
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.arrive(1, size),
        arrive=lambda barrier: barrier.arrive(1),
        wait=lambda barrier, parity: barrier.wait(int(parity)),
    )
    hopper.tma = types.SimpleNamespace(
        async_copy_global_to_shared=load_tile,
        async_copy_shared_to_global=lambda *copy: state.stores.append(copy),
        store_wait=store_wait,
    )
    ampere: Any = types.ModuleType("ampere")
    ampere.mma_v2 = mma
    ampere.async_copy = types.SimpleNamespace(
        async_copy_global_to_shared=copy_later,
        commit_group=commit_group,
        wait_group=wait_group,
    )
    host: Any = types.ModuleType("host")
    host.TensorDescriptor = Descriptor
    experimental: Any = types.ModuleType("experimental")
    experimental.gluon = gluon
    root = "triton.experimental.gluon"
    return {
        "triton.experimental": experimental,
        root: gluon,
        f"{root}.language": gl,
        f"{root}.language.nvidia.ampere": ampere,
        f"{root}.language.nvidia.hopper": hopper,
        f"{root}.nvidia.hopper": host,
    }


@contextmanager
def _replaced(modules: dict[str, Any]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_module(*names: str, change: tuple[str, str] | None = None) -> Any:
    """Return the last of the package's modules ``names``, with kernels that run in the emulator.

    It may import those before it. ``change`` replaces a text that occurs once in all of them, to
    test that a test fails.
    """
    package = Path(idefics2_kernels.__file__).parent
    files = {name: package / f"{name.replace('.', '/')}.py" for name in names}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if change is not None:
        assert sum(text.count(change[0]) for text in texts.values()) == 1, change[0]
        texts = {name: text.replace(*change) for name, text in texts.items()}
    modules = {name: types.ModuleType(f"idefics2_kernels.{name}") for name in names}
    with _replaced(_modules() | {module.__name__: module for module in modules.values()}):
        for name, module in modules.items():
            exec(compile(texts[name], str(files[name]), "exec"), vars(module))
    return module
