"""The table of the operations' gradients, and its implementations.

``REFERENCE_GRADIENTS`` is plain PyTorch and the specification, ``TRITON_GRADIENTS`` the kernels. As
in ``Ops`` there is no fallback: a gradient that has no kernel raises an error by its name.
``differentiable`` joins a table of operations and a table of gradients.
"""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Protocol

from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.ops import make_missing
from idefics2_kernels.reference import gradients


class LinearGradient(Protocol):
    """``linear``: ``dy`` (..., N), ``x`` (..., K), ``weight`` (N, K) -> dx, dweight, dbias.

    The last two are ``None`` unless wanted. ``x`` may be ``None`` without ``weight_grad``.
    """

    def __call__(  # noqa: D102
        self, dy: Tensor, x: Tensor | None, weight: Tensor, *, weight_grad: bool, bias_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


class NF4MatmulGradient(Protocol):
    """``nf4_matmul``: ``dy`` (..., N), ``weight`` (N, K) in NF4 -> dx (..., K)."""

    def __call__(self, dy: Tensor, weight: NF4Weight) -> Tensor: ...  # noqa: D102


class LoraLinearGradient(Protocol):
    """``lora_linear``: ``dy`` (..., N), ``x`` (..., K) -> dx, da (R, K), db (N, R).

    The last two are ``None`` without ``pair_grad``, and then ``x`` may be. The base does not train.
    """

    def __call__(  # noqa: D102
        self,
        dy: Tensor,
        x: Tensor | None,
        base: Tensor | NF4Weight,
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        pair_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


class RmsNormGradient(Protocol):
    """``rms_norm``: ``dy``, ``x``, ``dsum`` (..., N), ``weight`` (N,) -> dx, dweight or ``None``.

    It serves ``add_rms_norm``, with the sum as ``x`` and the sum's gradient ``dsum``, which is
    added to dx.
    """

    def __call__(  # noqa: D102
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        eps: float,
        dsum: Tensor | None = None,
        *,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


class LayerNormGradient(Protocol):
    """``layer_norm``: the same with a ``bias`` (N,) -> dx, dweight and dbias or ``None``."""

    def __call__(  # noqa: D102
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dsum: Tensor | None = None,
        *,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


class SiluMulGradient(Protocol):
    """``silu_mul``: ``dy`` (..., F), ``gate_up`` (..., 2F) -> dgate_up (..., 2F)."""

    def __call__(self, dy: Tensor, gate_up: Tensor) -> Tensor: ...  # noqa: D102


class GeluTanhGradient(Protocol):
    """``gelu_tanh``: ``dy`` and ``x`` (..., N), ``bias`` (N,) -> dx (..., N)."""

    def __call__(self, dy: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102


class RotaryGradient(Protocol):
    """``rotary``: ``dq`` (T, H, D), ``dk`` (T, H_KV, D) -> both rotated backward."""

    def __call__(  # noqa: D102
        self, dq: Tensor, dk: Tensor, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class FlashAttentionGradient(Protocol):
    """``flash_attention``: ``dout``, ``q``, ``out`` (T, H, D), ``lse`` (H, T) -> dq, dk, dv.

    ``out`` and ``lse`` are what the operation returned and wrote.
    """

    def __call__(  # noqa: D102
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        causal: bool,
        window: int | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class PerceiverAttentionGradient(Protocol):
    """``perceiver_attention``: ``dout`` (N, L, H, D) and its arguments -> their gradients."""

    def __call__(  # noqa: D102
        self,
        dout: Tensor,
        q: Tensor,
        k_context: Tensor,
        v_context: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...


class LinearCrossEntropy(Protocol):
    """The loss of a head: ``hidden`` (T, K), ``weight`` (V, K), ``targets`` (T,).

    The results are the sum of the losses, their number, and the gradients dhidden and dweight of
    the sum; dweight is ``None`` without ``weight_grad``. Rows whose target is -100 have no loss.
    ``labeled`` are the others, if they are known.
    """

    def __call__(  # noqa: D102
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        weight_grad: bool,
        labeled: Tensor | None = None,
    ) -> tuple[Tensor, int, Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Gradients:
    """One implementation of every gradient, by the name of its operation."""

    linear: LinearGradient
    nf4_matmul: NF4MatmulGradient
    lora_linear: LoraLinearGradient
    rms_norm: RmsNormGradient
    layer_norm: LayerNormGradient
    silu_mul: SiluMulGradient
    gelu_tanh: GeluTanhGradient
    rotary: RotaryGradient
    flash_attention: FlashAttentionGradient
    perceiver_attention: PerceiverAttentionGradient
    # Forward and backward pass at once, because the logits are not kept.
    linear_cross_entropy: LinearCrossEntropy


def triton_gradients() -> dict[str, Any]:
    """Return the gradients that have a Triton kernel by name, or none without Triton."""
    if find_spec("triton") is None:
        return {}
    from idefics2_kernels.backward import (
        activation,
        flash_attention,
        layer_norm,
        linear_cross_entropy,
        lora_linear,
        products,
        rms_norm,
        rotary,
    )

    return {
        "linear": products.linear_backward,
        "nf4_matmul": products.nf4_matmul_backward,
        "lora_linear": lora_linear.lora_linear_backward,
        "rms_norm": rms_norm.rms_norm_backward,
        "layer_norm": layer_norm.layer_norm_backward,
        "silu_mul": activation.silu_mul_backward,
        "gelu_tanh": activation.gelu_tanh_backward,
        "rotary": rotary.rotary_backward,
        "flash_attention": flash_attention.flash_attention_backward,
        "linear_cross_entropy": linear_cross_entropy.linear_cross_entropy,
    }


def make_triton_gradients() -> Gradients:
    """Return the table of kernels; a gradient without one raises ``MissingOperationError``."""
    kernels = triton_gradients()

    def find(name: str) -> Any:
        missing = make_missing(name, "TRITON_GRADIENTS", "REFERENCE_GRADIENTS")
        return kernels.get(name, missing)

    return Gradients(**{field.name: find(field.name) for field in fields(Gradients)})


REFERENCE_GRADIENTS = Gradients(
    **{field.name: getattr(gradients, field.name) for field in fields(Gradients)}
)
TRITON_GRADIENTS = make_triton_gradients()
