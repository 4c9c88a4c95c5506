"""The calls of a step: which operations it calls, on which shapes, and what the catalog says of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from inspect import signature
from typing import Any

import torch

from idefics2_kernels import REFERENCE, NF4Weight, Ops
from idefics2_kernels.catalog import CATALOG, Case, Cost

Around = Callable[[str, tuple[Any, ...], dict[str, Any]], AbstractContextManager[object]]
"""A context for one call, made from the operation's name and the arguments."""

Arguments = Mapping[str, Any]
_COSTS = {spec.name: spec.cost for spec in CATALOG}


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        operation: The field of ``Ops``.
        shape: The sizes that the model fixes, as a case of the catalog writes them.
        cost: Bytes and FLOP, or ``None`` for an operation that no step calls.
    """

    operation: str
    shape: str
    cost: Cost | None

    @property
    def label(self) -> str:
        """The name under which calls are added up."""
        return f"{self.operation} {self.shape}".strip()


class WatchedOps:
    """Operations whose calls can be watched.

    Attributes:
        ops: The operations, with which the model is built.
    """

    def __init__(self, ops: Ops) -> None:
        self._around: Around | None = None
        watched = {field.name: self._watched(field.name, ops) for field in fields(Ops)}
        self.ops = Ops(**watched)

    @contextmanager
    def during(self, around: Around) -> Iterator[None]:
        """Make each call inside a context of its own."""
        self._around = around
        try:
            yield
        finally:
            self._around = None

    def calls_of(self, step: Callable[[], object]) -> list[Call]:
        """Run ``step`` once and return its calls. Lengths are read back from the device."""
        calls: list[Call] = []

        @contextmanager
        def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
            calls.append(call_of(name, args, kwargs))
            yield

        with self.during(record):
            step()
        return calls

    def _watched(self, name: str, ops: Ops) -> Callable[..., Any]:
        operation: Callable[..., Any] = getattr(ops, name)

        @wraps(operation)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._around is None:
                return operation(*args, **kwargs)
            with self._around(name, args, kwargs):
                return operation(*args, **kwargs)

        return call


def call_of(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return what the catalog says of a call of ``operation`` with these arguments."""
    if operation not in _CASES:
        return Call(operation, "", None)
    bound = signature(getattr(REFERENCE, operation)).bind(*args, **kwargs)
    bound.apply_defaults()
    shape, dims, dtype = _CASES[operation](bound.arguments)
    return Call(operation, shape, _COSTS[operation](Case("", dims, dtype)))


_Described = tuple[str, dict[str, Any], torch.dtype]


def _product(at: Arguments) -> _Described:
    x, (N, K) = at["x"], at["weight"].shape
    dims = {"M": x.numel() // K, "N": N, "K": K, "bias": at["bias"] is not None}
    return f"{N}x{K}", dims, x.dtype


def _lora_linear(at: Arguments) -> _Described:
    x, base, R = at["x"], at["base"], at["a"].shape[0]
    N, K = base.shape
    dims = {"M": x.numel() // K, "N": N, "K": K, "R": R, "bias": at["bias"] is not None}
    return f"{N}x{K}-r{R}", {**dims, "nf4": isinstance(base, NF4Weight)}, x.dtype


def _rows(at: Arguments) -> _Described:
    x = at["x"]
    return str(x.shape[-1]), {"shape": tuple(x.shape)}, x.dtype


def _gated_rows(at: Arguments) -> _Described:
    *lead, both = at["gate_up"].shape
    return str(both // 2), {"shape": (*lead, both // 2)}, at["gate_up"].dtype


def _rotary(at: Arguments) -> _Described:
    (T, H, D), H_KV = at["q"].shape, at["k"].shape[1]
    return f"{H}+{H_KV}x{D}", {"T": T, "H": H, "H_KV": H_KV, "D": D}, at["q"].dtype


def _flash_attention(at: Arguments) -> _Described:
    dims = {**_heads(at["q"], at["k"], heads=1), "lengths": _lengths(at)}
    dims |= {"causal": at["causal"], "window": at["window"]}
    return f"{dims['H']}x{dims['D']}", dims, at["q"].dtype


def _paged_attention(at: Arguments) -> _Described:
    dims = {**_heads(at["q"], at["k_cache"], heads=1), "queries": _lengths(at)}
    dims |= {"contexts": tuple(at["context_lens"].tolist()), "window": at["window"]}
    return f"{dims['H']}x{dims['D']}", dims, at["q"].dtype


def _perceiver_attention(at: Arguments) -> _Described:
    dims = {**_heads(at["q"], at["k_latents"], heads=2), "lengths": _lengths(at)}
    return f"{dims['H']}x{dims['D']}", {**dims, "L": at["q"].shape[1]}, at["q"].dtype


def _patches(at: Arguments) -> _Described:
    side, channels = at["patch_size"], len(at["mean"])
    dims = {"grids": ((1, int(at["cu_seqlens"][-1])),), "patch_size": side, "channels": channels}
    return f"{channels}x{side}x{side}", dims, at["dtype"]


def _heads(q: torch.Tensor, k: torch.Tensor, heads: int) -> dict[str, Any]:
    return {"H": q.shape[heads], "H_KV": k.shape[heads], "D": q.shape[-1]}


def _lengths(at: Arguments) -> tuple[int, ...]:
    return tuple(at["cu_seqlens"].diff().tolist())


# The operations of steps that choose the likeliest token
_CASES: dict[str, Callable[[Arguments], _Described]] = {
    "linear": _product,
    "linear_gelu": _product,
    "nf4_matmul": _product,
    "lora_linear": _lora_linear,
    "rms_norm": _rows,
    "add_rms_norm": _rows,
    "layer_norm": _rows,
    "add_layer_norm": _rows,
    "gelu_tanh": _rows,
    "silu_mul": _gated_rows,
    "rotary": _rotary,
    "rotary_and_cache": _rotary,
    "flash_attention": _flash_attention,
    "paged_attention": _paged_attention,
    "perceiver_attention": _perceiver_attention,
    "patches": _patches,
}
