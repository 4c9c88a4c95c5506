"""bitsandbytes' NF4 layer with this package's product."""

from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from idefics2_engine.hf.operations import needs_gradients, operations_of
from idefics2_kernels import NF4Weight
from idefics2_kernels.nf4.nf4_weight import BLOCK


class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc, name-defined]
    """A linear layer in NF4, multiplied from the layer's own tensors, without a copy of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., K) to (..., N) in the layer's ``compute_dtype``, if it has one."""
        ops = operations_of(self).for_call(x, module=self)
        weight = None if ops is None else self.nf4_weight(self.compute_dtype or x.dtype)
        if ops is None or weight is None:
            out: Tensor = super().forward(x)
            return out
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        if bias is not None and needs_gradients(bias):
            # The operation has no gradient of a bias
            out = ops.nf4_matmul(x.to(weight.dtype), weight) + bias
            return out.to(x.dtype)
        return ops.nf4_matmul(x.to(weight.dtype), weight, bias).to(x.dtype)

    def nf4_weight(self, dtype: torch.dtype) -> NF4Weight | None:
        """Return the weight to multiply in ``dtype``, or ``None`` if it is in another format."""
        state: Any = getattr(self.weight, "quant_state", None)
        known: NF4Weight | None = self.__dict__.get("_known_nf4")
        if (
            known is not None
            and state is not None
            and known.absmax is state.absmax
            and known.codes.data_ptr() == self.weight.data_ptr()
            and known.dtype == dtype
        ):
            return known
        self.__dict__["_known_nf4"] = None if state is None else _weight(self.weight, state, dtype)
        found: NF4Weight | None = self.__dict__["_known_nf4"]
        return found

    def share(self, weight: NF4Weight) -> None:
        """Let the layer's tensors be those of ``weight``, which has the same values."""
        self.weight.data = weight.codes.view(self.weight.shape)
        state: Any = self.weight.quant_state
        state.absmax = weight.absmax
        if state.state2 is not None:
            state.state2.absmax = weight.nested_absmax
        self.__dict__["_known_nf4"] = weight


def _weight(codes: Tensor, state: Any, dtype: torch.dtype) -> NF4Weight | None:
    """Return ``codes`` and bitsandbytes' ``state`` as one weight, or ``None`` in another format."""
    if (
        state.quant_type != "nf4"
        or state.blocksize != BLOCK
        or codes.dtype != torch.uint8
        # bitsandbytes' own order of codes for AVX-512
        or getattr(state, "packing_format_for_cpu", False)
    ):
        return None
    flat = codes.detach().view(-1)
    shape = tuple(state.shape)
    nested = state.state2
    if nested is None:
        return NF4Weight(flat, state.absmax, shape, dtype)
    # One number of the tensor is one for each nested block here
    offset = state.offset.float().reshape(1).expand(nested.absmax.numel()).contiguous()
    return NF4Weight(flat, state.absmax, shape, dtype, offset, nested.absmax, nested.code)
