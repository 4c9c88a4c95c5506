"""Gradient checkpointing that computes attention once.

A checkpointed layer keeps its input, and its forward pass is computed again in the backward pass.
Attention is the one part of a layer that takes longer than linear in the length of a sequence, and
its gradient needs its result and the log-sum-exp of its scores alone. Both are kept, so the second
pass computes the queries, keys and values again and reads the rest. The bits are those of the first.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import Ops


class _Layer:
    """The results of attention in one call of a checkpointed layer."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, Tensor]] = []
        self._is_again = False
        self._next = 0

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the layer: the first time its results are kept, then they are read."""
        self._next = 0
        before = _LAYER.set(self)
        try:
            return function(*args)
        finally:
            _LAYER.reset(before)
            self._is_again = True

    def attend(
        self, attention: Callable[..., Tensor], q: Tensor, *args: Any, lse: Tensor | None, **kw: Any
    ) -> Tensor:
        """Return the result of ``attention`` and write the log-sum-exp to ``lse``."""
        if self._is_again:
            out, sums = self._results[self._next]
            self._next += 1
            if lse is not None:
                lse.copy_(sums)
        else:
            T, H, _ = q.shape
            dtype = torch.promote_types(q.dtype, torch.float32)
            sums = torch.empty(H, T, dtype=dtype, device=q.device) if lse is None else lse
            out = attention(q, *args, lse=sums, **kw)
            self._results.append((out.detach(), sums.detach()))
        # Autograd gives the tensor that is returned a history, which the kept one must not have
        return out.detach()


_LAYER: ContextVar[_Layer | None] = ContextVar("_LAYER", default=None)


def keeping_attention(ops: Ops) -> Ops:
    """Return ``ops``, whose attention is kept while a checkpointed layer is called."""

    def flash_attention(q: Tensor, *args: Any, lse: Tensor | None = None, **kw: Any) -> Tensor:
        layer = _LAYER.get()
        if layer is None:
            return ops.flash_attention(q, *args, lse=lse, **kw)
        return layer.attend(ops.flash_attention, q, *args, lse=lse, **kw)

    return replace(ops, flash_attention=flash_attention)


class CheckpointedLayer:
    """A layer of transformers whose gradient checkpointing keeps the results of its attention."""

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        try:
            given = self.__dict__["_gradient_checkpointing_func"]
        except KeyError as error:
            raise AttributeError("_gradient_checkpointing_func") from error
        return partial(_checkpoint, given)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, given: Callable[..., Any]) -> None:
        self.__dict__["_gradient_checkpointing_func"] = given


def _checkpoint(given: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` by the checkpoint function that transformers was ``given``."""
    if not torch.is_grad_enabled():
        # There will be no second pass, and reentrant checkpoints would warn of that
        return function(*args)
    return given(partial(_Layer().run, function), *args)
