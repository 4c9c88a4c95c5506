"""Runs a kernel file written in Gluon on a CPU, each warp group in a thread of its own.

Matrices are float64. What a kernel loads by pointers, or from shared memory that is no matrix, keeps its type.

Gluon has no interpreter. This one knows what the kernels use, and takes the hardware at its latest:
products read shared memory when they are waited for, copies run in any order, and shared memory begins as NaN. So a
barrier that is missing shows as a wrong number, and one too many as a program that never ends.
"""

import math
import random
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import idefics2_kernels

PATIENCE = 20.0  # seconds that a barrier is waited for
_local = threading.local()


class Array(np.ndarray):
    """A tensor in registers; its layout does not matter."""

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent=None))
    dtype_name = None

    def to(self, dtype: Any, bitcast: bool = False) -> "Array":
        if bitcast:
            bits = torch.from_numpy(np.asarray(self, dtype=np.uint16).view(np.int16))
            return _array(bits.view(dtype).double())
        if dtype in _TYPES and self.dtype != np.float64:
            return self.astype(_TYPES[str(dtype)]).view(Array)
        return self


_TYPES = {"int32": np.int64, "int64": np.int64, "float32": np.float32}  # in registers


def _typed(values: Any, dtype: str) -> Array:
    """Return numbers of a type that is computed with as such; integers are wide, and cut by what reads their bits."""
    assert not np.isnan(values).any(), "shared memory that nothing was written to"
    return np.asarray(values).astype(_TYPES[dtype]).view(Array)


def _array(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64).view(Array)


class Shared:
    """A piece of shared memory."""

    def __init__(self, values: Any, dtype: Any = None, first: int = 0) -> None:
        self.values, self.dtype, self.first = values, dtype, first
        self.shape = list(values.shape)

    def index(self, i: int) -> Any:
        piece = self.values[int(i)]
        first = self.first + int(i) * piece.size
        return piece[0] if piece.dtype == object else Shared(piece, self.dtype, first)

    def reshape(self, shape: list[int]) -> "Shared":
        view = self.values.reshape(shape)
        assert view.base is not None
        return Shared(view, self.dtype)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.values.transpose(order), self.dtype)

    def store(self, values: Any) -> None:
        self.values[...] = values

    def load(self, _layout: object) -> Array:
        if self.dtype in _TYPES:
            return _typed(self.values, self.dtype)
        return _array(self.values.copy())

    def reinterpret(self, dtype: object, shape: list[int], _layout: object) -> Any:
        if len(shape) == 6:
            return Boxes(self, shape)
        return (
            self.reshape(shape)
            if math.prod(shape) == self.values.size
            else self.piece(dtype, shape)
        )

    def piece(self, dtype: Any, shape: list[int]) -> "Shared":
        """Return memory of its own for what begins at this page of an allocation of words, and lies beside the others."""
        begin = 4 * self.first
        end = begin + math.prod(shape) * (4 if dtype == "float32" else 2)
        assert end <= 4 * _local.words.size
        assert all(end <= first or last <= begin for first, last, _ in _local.pieces)
        memory = np.full(shape, np.nan)
        _local.pieces.append((begin, end, memory))
        return Shared(memory, dtype)

    def _keep_alive(self) -> None:
        pass


class Boxes:
    """Tiles of shared memory (n, 1, 1, rows, 1, columns) as smaller ones, in the order in which they lie there.

    A tile lies there column block by column block, each as wide as its swizzle, and its rows below each other.
    """

    def __init__(self, tiles: Shared, shape: list[int]) -> None:
        num, _, _, rows, _, columns = tiles.shape
        assert columns in (16, 32, 64, 128)
        assert shape[5] == min(columns, 64)
        parts = num, rows // shape[3], shape[3], columns // shape[5], shape[5]
        self.boxes = tiles.values.reshape(parts).transpose(0, 3, 1, 2, 4)
        self.shape = shape
        assert shape[0] == num * parts[1] * parts[3]

    def index(self, i: int) -> Shared:
        box = self.boxes[np.unravel_index(int(i), self.boxes.shape[:3])]
        return Shared(box[None, None, :, None, :])


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, arrivals: int, announced: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += announced
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        assert parity in (0, 1)
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase & 1 != parity, PATIENCE)
        assert done, "waited for ever"


class Descriptor:
    """A tensor in global memory, read and written in boxes; what lies outside its shape reads as zero."""

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: object
    ) -> None:
        self.base, self.shape, self.strides = base, shape, strides
        self.block_type = types.SimpleNamespace(shape=block)
        self.dtype, self.layout = base.dtype, layout

    def _places(self, corner: list[int]) -> tuple[Any, Any]:
        """Return where the box's elements lie in the storage, and which of them lie within the shape."""
        places = np.zeros(self.block_type.shape, dtype=object)
        inside = np.ones(self.block_type.shape, dtype=bool)
        for axis, (first, size) in enumerate(zip(corner, self.block_type.shape, strict=True)):
            along = [1] * len(corner)
            along[axis] = size
            index = np.array([int(first) + i for i in range(size)], dtype=object).reshape(along)
            inside &= (index >= 0) & (index < self.shape[axis])
            places = places + index * self.strides[axis]
        return places % (2**64 // self.base.itemsize), inside

    def load(self, corner: list[int]) -> Any:
        places, inside = self._places(corner)
        values = np.zeros(places.shape)
        values[inside] = flat(self.base)[self._indices(places[inside])].double()
        return values

    def store(self, corner: list[int], values: Any) -> None:
        places, inside = self._places(corner)
        flat(self.base)[self._indices(places[inside])] = torch.tensor(values[inside]).to(
            self.base.dtype
        )

    @staticmethod
    def _indices(places: Any) -> Tensor:
        return torch.tensor([int(place) for place in places], dtype=torch.int64)


class Product:
    """A product on its way; it is computed when it is waited for."""

    type = Array.type

    def __init__(self, a: Any, b: Any, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Array | None = None
        _local.products.append(self)

    def finish(self) -> None:
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        a, b = (x.values if isinstance(x, Shared) else x for x in (self.a, self.b))
        self.value = _array(a @ b + acc)


def _warpgroup_mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    assert is_async
    return Product(a, b, acc if use_acc else 0.0)


def _warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    time.sleep(1e-3)  # for a copy that need not wait to come before
    while len(_local.products) > outstanding:
        _local.products.pop(0).finish()
    values = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    assert all(value is not None for value in values), "a result that was not waited for"
    return values[0] if len(values) == 1 else values


class _Copies:
    """The copy engine: a thread that takes copies in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: list[Callable[[], None]] = []
        self.changed = threading.Condition()
        self.over = False
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def add(self, copy: Callable[[], None]) -> None:
        with self.changed:
            self.waiting.append(copy)
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.over)
                if not self.waiting:
                    return
                copy = self.waiting.pop(self.random.randrange(len(self.waiting)))
            try:
                copy()
            except (AssertionError, IndexError) as error:
                self.failure = error

    def end(self) -> None:
        with self.changed:
            self.over = True
            self.changed.notify()
        self.thread.join()
        if self.failure:
            raise self.failure


class _Kernel:
    """A jitted function: a plain one when called, a kernel when launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int = 0, **kwargs: Any) -> None:
            assert num_warps in (1, 2, 4, 8, 16)
            assert maxnreg % 8 == 0
            args = tuple(_Pointer(a) if isinstance(a, Tensor) else a for a in args)
            for program in reversed(range(grid[0])):  # what one writes of the next's stays
                _local.program, _local.programs = program, grid[0]
                _local.copies = _Copies(program)
                _local.pieces, _local.groups, _local.group = [], [], []
                _local.words = None
                try:
                    self.function(*args, **kwargs)
                finally:
                    _local.copies.end()

        return launch


class _Pointer:
    """An address, or an array of them."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.tensor, np.asarray(self.offset + offset, dtype=np.int64))

    def read(self, mask: Any, other: float) -> Array:
        """Return what lies there, fp32 as fp32 and all other floats as float64, ``other`` where not ``mask``."""
        mask, offset = np.broadcast_arrays(mask, self.offset)
        assert (offset[mask] >= 0).all(), "read before a tensor"
        memory = flat(self.tensor)
        values = memory[torch.from_numpy(offset[mask].copy())]
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.double()
        if not values.dtype.is_floating_point:
            values = values.long()  # what is done with bytes is done after a cast
        result = np.full(mask.shape, other, dtype=values.numpy().dtype)
        result[mask] = values.numpy()
        return result.view(Array)


def _load(pointer: _Pointer, mask: Any = True, other: float = 0, eviction_policy: str = "") -> Any:
    values = pointer.read(mask, other)
    return values if values.ndim or values.dtype.kind == "f" else int(values)


def _store(pointer: _Pointer, values: Any, mask: Any = True) -> None:
    mask, offset, values = np.broadcast_arrays(mask, pointer.offset, values)
    assert (offset[mask] >= 0).all(), "written before a tensor"
    places = torch.from_numpy(offset[mask].copy())
    assert len(places.unique()) == len(places), "written twice"
    flat(pointer.tensor)[places] = torch.from_numpy(values[mask].copy()).to(pointer.tensor.dtype)


def _atomic_add(pointer: _Pointer, value: int) -> int:
    """Add, and return what was there; programs run one after the other."""
    place = flat(pointer.tensor)[int(pointer.offset)]
    before = int(place)
    place += value
    return before


def _copy_later(smem: Shared, pointer: _Pointer, mask: Any) -> None:
    """Copy when it is waited for."""
    _local.group.append(lambda: smem.store(pointer.read(mask, 0)))


def _commit_group() -> None:
    _local.groups.append(_local.group)
    _local.group = []


def _wait_group(outstanding: int) -> None:
    while len(_local.groups) > outstanding:
        for copy in _local.groups.pop(0):
            copy()


def _permute_bytes(a: Any, b: Any, selector: Any) -> Any:
    """Compute ``prmt.b32``."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << 32
    result = both & 0
    for i in range(4):
        nibble = np.asarray(selector).astype(np.uint64) >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 0xFF
        result |= np.where(nibble & 8 != 0, (byte >> 7) * 0xFF, byte) << 8 * i
    return result.astype(np.uint32)


def _round_pair(dtype: torch.dtype, high: Any, low: Any) -> Any:
    pair = (
        torch.from_numpy(np.asarray(x)).to(dtype).view(torch.int16).numpy() for x in (high, low)
    )
    high_bits, low_bits = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in pair)
    return high_bits << 16 | low_bits


def _words(address: Any) -> Any:
    """Return the shared memory at an address: what was made of its bytes or else the whole, and the places in it."""
    assert (address % 4 == 0).all()
    address = address.astype(np.int64)
    pieces = (memory for first, last, memory in _local.pieces if first <= address.min() < last)
    return next(pieces, _local.words).reshape(-1), address // 4


def _load_words(count: int, address: Any) -> Any:
    assert (address % (4 * count) == 0).all()
    loaded = []
    for i in range(count):
        words, places = _words(address + np.uint32(4 * i))
        loaded.append(words[places].astype(np.float32))
    return tuple(loaded) if count > 1 else loaded[0]


def _store_words(count: int, guard: Any, address: Any, *values: Any) -> None:
    assert len(values) == count
    assert (address % (4 * count) == 0).all()
    for i, value in enumerate(values):
        is_stored, place, word = np.broadcast_arrays(guard, address + np.uint32(4 * i), value)
        words, places = _words(place[is_stored])
        words[places] = word[is_stored]


def _choose_bits(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Compute ``lop3.b32`` for its one use."""
    assert table == 0xCA
    return a & b | ~a & c


# what a statement of PTX returns, for its operands but the first
_PTX: dict[str, Callable[..., Any]] = {
    "prmt.b32": _permute_bytes,
    "add.u32": lambda a, b: a + b,
    "shr.u32": lambda a, b: a >> b,
    "mul.rn.f32": lambda a, b: a * b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "lop3.b32": _choose_bits,
    "setp.ne.u32": lambda a, b: a != b,
    "ld.shared.f32": lambda a: _load_words(1, a),
    "ld.shared.v2.f32": lambda a: _load_words(2, a),
    "ld.shared.v4.f32": lambda a: _load_words(4, a),
    "cvt.rn.bf16x2.f32": lambda high, low: _round_pair(torch.bfloat16, high, low),
    "cvt.rn.f16x2.f32": lambda high, low: _round_pair(torch.float16, high, low),
    "mov.b32": lambda a: (a & 0xFFFF, a >> 16),
    "mov.u32": lambda a: a,
}
# the program's first thread, and its shared memory
_SPECIAL = {"%tid.x": np.uint32(0), "global_smem": np.uint32(0)}


def _halves(pairs: Any, dtype: torch.dtype) -> Array:
    """Return the two numbers of registers that are given twice."""
    assert (pairs[..., 0] == pairs[..., 1]).all(), "the first of two elements gives both"
    bits = np.stack([pairs[..., 0] & 0xFFFF, pairs[..., 0] >> 16 & 0xFFFF], -1)
    return bits.astype(np.uint16).view(Array).to(dtype, bitcast=True)


def _split(values: Any) -> tuple[Any, Any]:
    assert values.shape[-1] == 2
    return values[..., 0], values[..., 1]


def _value(source: str, registers: dict[str, Any]) -> Any:
    """Return what an operand stands for: a register, an address with a displacement, a number."""
    source, _, displacement = source.strip("[] ").partition("+")
    known = registers if source in registers else _SPECIAL
    if source not in known and source.startswith("0f"):
        return np.uint32(int(source[2:], 16)).view(np.float32)
    word = known[source] if source in known else np.uint32(int(source, 0))
    return word + np.uint32(displacement) if displacement else word


def _asm(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """Run the few instructions that the kernels use."""
    if pack == 2:
        assert (text, constraints) == ("mov.b32 $0, $1;", "=r,r,r")
        return _halves(args[0], dtype)
    assert pack == 1
    kinds = [kind.strip("=&") for kind in constraints.split(",")]
    outputs = constraints.count("=")
    registers: dict[str, Any] = {}
    for i, value in enumerate(np.broadcast_arrays(*args)):
        words = np.float32 if kinds[outputs + i] == "f" else np.uint32
        values = np.asarray(value)
        registers[f"${outputs + i}"] = values.astype(
            np.int64 if words is np.uint32 else words
        ).astype(words)
    for statement in re.sub(r"\.reg[^;]*;", "", text).split(";"):
        statement = re.sub(r"^[{}\s]+", "", statement).strip()
        if not statement or statement.startswith("bar.sync"):
            continue
        guard = np.True_
        if statement.startswith("@"):
            predicate, statement = statement.split(maxsplit=1)
            guard = registers[predicate[1:]]
        name, operands = statement.split(maxsplit=1)
        if name.startswith("st.shared."):
            address, *stored = (_value(x, registers) for x in re.findall(r"[^,{}\s]+", operands))
            _store_words(len(stored), guard, address, *stored)
            continue
        results, *sources = re.findall(r"\{[^}]*\}|[^,\s][^,]*", operands)
        outcome = _PTX[name](*(_value(source, registers) for source in sources))
        names = results.strip("{} ").replace(" ", "").split(",")
        for result, value in zip(names, outcome if len(names) > 1 else (outcome,), strict=True):
            registers[result] = value
    found = tuple(np.asarray(registers[f"${i}"]) for i in range(outputs))
    found = tuple(x.view(Array) if x.ndim else x for x in found)
    return found if isinstance(dtype, tuple) else found[0]


def flat(tensor: Tensor) -> Tensor:
    """Return all of the memory from a tensor's first element to its last."""
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent + 1,), (1,))


def _warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    here = dict(vars(_local))
    failures: list[BaseException] = []

    def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
        vars(_local).update(here)
        _local.products, _local.stores = [], []
        try:
            function(*args)
            assert not _local.products, "a product that was never waited for"
            assert not _local.stores, "a store that was never waited for"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _allocate(dtype: Any, shape: list[int], _layout: object) -> Shared:
    if dtype == "int64":
        barriers = np.empty(shape, dtype=object)
        for place in np.ndindex(*shape):
            barriers[place] = Barrier()
        return Shared(barriers)
    memory = np.full(shape, np.nan)
    if _local.words is None:  # what lies first is what assembly reads
        _local.words = memory
    return Shared(memory, dtype)


def _load_tile(desc: Descriptor, corner: list[int], barrier: Barrier, tile: Shared) -> None:
    assert all(-(2**31) <= place < 2**31 for place in corner), "a coordinate of more than 32 bits"

    def copy() -> None:
        tile.values[...] = desc.load(corner)
        barrier.arrive(0, -tile.values.size * desc.base.itemsize)

    _local.copies.add(copy)


def _store_wait(pending: int) -> None:
    while len(_local.stores) > pending:
        desc, corner, tile = _local.stores.pop(0)
        desc.store(corner, tile.values)


def _jit(function: Any = None, **_options: Any) -> Any:
    return _Kernel if function is None else _Kernel(function)


def _no_layout(*_args: object, **_options: object) -> None:
    pass


def _mma(a: Any, b: Any, acc: Any) -> Array:
    with np.errstate(invalid="ignore"):  # rows that are not there, by infinite weights
        return _array(a @ b + acc)


def _modules() -> dict[str, Any]:
    """Return what stands for Gluon's modules."""
    gl: Any = types.ModuleType("gl")
    gl.constexpr = lambda value: value
    gl.int64, gl.float32, gl.int32, gl.uint16 = "int64", "float32", "int32", "uint16"
    gl.float16, gl.bfloat16 = torch.float16, torch.bfloat16
    gl.program_id = lambda _axis: _local.program
    gl.num_programs = lambda _axis: _local.programs
    gl.load, gl.store, gl.atomic_add = _load, _store, _atomic_add
    gl.static_range = range
    gl.minimum, gl.maximum = np.minimum, np.maximum
    gl.cdiv = lambda a, b: int((a + b - 1) / b)  # rounds to zero, as the hardware does
    gl.cast = lambda value, _dtype: value
    gl.where, gl.exp2 = np.where, np.exp2
    gl.max, gl.sum = np.max, np.sum
    gl.split = _split
    gl.join = lambda a, b: np.stack([a, b], axis=-1).view(Array)
    gl.permute, gl.reshape, gl.broadcast = np.transpose, np.reshape, np.broadcast_arrays
    gl.inline_asm_elementwise = _asm
    gl.arange = lambda begin, end, _layout: np.arange(begin, end).view(Array)
    gl.full = lambda shape, value, _dtype, _layout: _array(np.full(shape, value))
    gl.zeros = lambda shape, _dtype, _layout: _array(np.zeros(shape))
    gl.convert_layout = lambda value, _layout: value
    gl.NVMMADistributedLayout = gl.DotOperandLayout = gl.SliceLayout = _no_layout
    gl.DistributedLinearLayout = gl.BlockedLayout = gl.SwizzledSharedLayout = _no_layout
    gl.NVMMASharedLayout = _no_layout
    gl.allocate_shared_memory = _allocate
    gl.shared_memory_descriptor = Shared
    gl.warp_specialize = _warp_specialize
    gluon: Any = types.ModuleType("gluon")
    gluon.jit, gluon.language = _jit, gl
    hopper: Any = types.ModuleType("hopper")
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _warpgroup_mma, _warpgroup_mma_wait
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.arrive(1, size),
        arrive=lambda barrier: barrier.arrive(1),
        wait=lambda barrier, parity: barrier.wait(int(parity)),
    )
    hopper.tma = types.SimpleNamespace(
        async_copy_global_to_shared=_load_tile,
        async_copy_shared_to_global=lambda *copy: _local.stores.append(copy),
        store_wait=_store_wait,
    )
    ampere: Any = types.ModuleType("ampere")
    ampere.mma_v2 = _mma
    ampere.async_copy = types.SimpleNamespace(
        async_copy_global_to_shared=_copy_later,
        commit_group=_commit_group,
        wait_group=_wait_group,
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


def load(*names: str, change: tuple[str, str] | None = None) -> Any:
    """Return the last of the package's modules ``names`` with kernels that run here; it may import those before it.

    ``change`` replaces a text that occurs once in all of them, to see a test fail.
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
