"""The few PTX instructions that the kernels use."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gluon_emulator.program import state
from gluon_emulator.registers import Array


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
    """Return the shared memory at an address, and the indices in it.

    The memory is the piece that was allocated there, or else the whole.
    """
    assert (address % 4 == 0).all()
    address = address.astype(np.int64)
    pieces = (memory for first, last, memory in state.pieces if first <= address.min() < last)
    return next(pieces, state.words).reshape(-1), address // 4


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
    """Compute ``lop3.b32`` for the only table that kernels use."""
    assert table == 0xCA
    return a & b | ~a & c


# Functions from the operands of a PTX instruction, without the first, to its result
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


# The program is its first thread, and its shared memory starts at 0
_SPECIAL = {"%tid.x": np.uint32(0), "global_smem": np.uint32(0)}


def _halves(pairs: Any, dtype: torch.dtype) -> Array:
    """Unpack registers (..., 2) whose pairs are equal: each holds two numbers of 16 bits."""
    assert (pairs[..., 0] == pairs[..., 1]).all(), "the first of two elements gives both"
    bits = np.stack([pairs[..., 0] & 0xFFFF, pairs[..., 0] >> 16 & 0xFFFF], -1)
    return bits.astype(np.uint16).view(Array).to(dtype, bitcast=True)


def _value(source: str, registers: dict[str, Any]) -> Any:
    """Return the value of an operand: a register, an address with a displacement, or a number."""
    source, _, displacement = source.strip("[] ").partition("+")
    known = registers if source in registers else _SPECIAL
    if source not in known and source.startswith("0f"):
        return np.uint32(int(source[2:], 16)).view(np.float32)
    word = known[source] if source in known else np.uint32(int(source, 0))
    return word + np.uint32(displacement) if displacement else word


def run_asm(
    text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """Run the instructions of PTX that the kernels use."""
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
