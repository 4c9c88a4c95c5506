"""The table of the model's operations, and its implementations.

A model receives an ``Ops`` when it is built and calls every operation through it. There is no
fallback: an operation that cannot run raises an error. To find the operation that causes a wrong
logit, replace one at a time:
``dataclasses.replace(TRITON, flash_attention=REFERENCE.flash_attention)``.
The package ``reference`` defines what each operation computes. The shapes are repeated here.

``ROW_BY_ROW`` is the reference, except that no row of a product depends on the others in its last
bits, which is slow. Autograd does not record kernels, so the gradient would stop at one without an
error. Every operation of ``TRITON`` therefore rejects inputs that require a gradient, even for
shapes that PyTorch's own operations would compute. ``differentiable`` joins ``TRITON`` and
``TRITON_GRADIENTS`` to a table whose operations have a gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from importlib.util import find_spec
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.reference import attention, low_rank, nf4, operations, row_by_row, sampling


class MissingOperationError(RuntimeError):
    """An operation was called that this implementation of ``Ops`` does not have."""


class NoGradientError(RuntimeError):
    """An operation without a gradient got an input that requires one."""


class Linear(Protocol):
    """Dense product: ``x`` (..., K), ``weight`` (N, K), ``bias`` (N,) -> (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102


class NF4Quantize(Protocol):
    """Quantization: ``weight`` of any shape -> the same weight in NF4."""

    def __call__(self, weight: Tensor, *, double_quant: bool = True) -> NF4Weight: ...  # noqa: D102


class NF4Dequantize(Protocol):
    """Dequantization: ``weight`` in NF4 -> a tensor of the weight's shape and dtype."""

    def __call__(self, weight: NF4Weight) -> Tensor: ...  # noqa: D102


class NF4Matmul(Protocol):
    """Product with NF4: ``x`` (..., K), ``weight`` (N, K), ``bias`` (N,) -> (..., N)."""

    def __call__(self, x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102


class LoraLinear(Protocol):
    """Product with a low-rank one beside it: ``x`` (..., K), ``base`` (N, K) -> (..., N).

    ``base`` is dense or in NF4, ``a`` (R, K), ``b`` (N, R), ``bias`` (N,).
    """

    def __call__(  # noqa: D102
        self,
        x: Tensor,
        base: Tensor | NF4Weight,
        a: Tensor,
        b: Tensor,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor: ...


class RmsNorm(Protocol):
    """RMS norm: ``x`` (..., N), ``weight`` (N,) -> (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...  # noqa: D102


class AddRmsNorm(Protocol):
    """RMS norm of a sum: ``x``, ``residual`` (..., N), ``weight`` (N,) -> norm, sum (..., N)."""

    def __call__(  # noqa: D102
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class LayerNorm(Protocol):
    """Layer norm: ``x`` (..., N), ``weight`` and ``bias`` (N,) -> (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...  # noqa: D102


class AddLayerNorm(Protocol):
    """Layer norm of a sum: ``x`` and ``residual`` (..., N) -> norm of the sum, sum (..., N).

    ``weight`` and ``bias`` are (N,).
    """

    def __call__(  # noqa: D102
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class SiluMul(Protocol):
    """Gated SiLU: ``gate_up`` (..., 2F) -> (..., F)."""

    def __call__(self, gate_up: Tensor) -> Tensor: ...  # noqa: D102


class GeluTanh(Protocol):
    """GELU in the tanh form: ``x`` (..., N), ``bias`` (N,) -> (..., N)."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102


class Rotary(Protocol):
    """Rotary positions: ``q`` (T, H, D), ``k`` (T, H_KV, D) -> rotated q and k.

    ``positions`` is (T,), ``cos_sin`` is (W, D).
    """

    def __call__(  # noqa: D102
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class RotaryAndCache(Protocol):
    """``Rotary``, and writing ``k`` and ``v`` to ``slots`` (T,) of the caches -> rotated q.

    ``v`` is (T, H_KV, D). The caches are (pages, H_KV, P, D).
    """

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor: ...


class FlashAttention(Protocol):
    """Attention within packed sequences: ``q`` (T, H, D) -> (T, H, D).

    ``k`` and ``v`` are (T, H_KV, D), ``cu_seqlens`` is (B + 1,). ``lse`` (H, T) is written.
    """

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        causal: bool,
        window: int | None = None,
        scale: float | None = None,
        lse: Tensor | None = None,
    ) -> Tensor: ...


class PagedAttention(Protocol):
    """Attention to the paged KV cache: ``q`` (T, H, D) -> (T, H, D).

    The caches are (pages, H_KV, P, D). ``block_table`` is (B, pages of a sequence),
    ``context_lens`` is (B,), and ``cu_seqlens`` is (B + 1,). ``shared_prefixes`` (B, 6) changes
    nothing but the order of sums.
    """

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        window: int | None = None,
        scale: float | None = None,
        shared_prefixes: Tensor | None = None,
    ) -> Tensor: ...


class PerceiverAttention(Protocol):
    """Attention of latents to patches and latents: ``q`` (N, L, H, D) -> (N, L, H, D).

    ``k_context`` and ``v_context`` are (P, H_KV, D), ``k_latents`` and ``v_latents`` are
    (N, L, H_KV, D), and ``cu_seqlens`` is (N + 1,).
    """

    def __call__(  # noqa: D102
        self,
        q: Tensor,
        k_context: Tensor,
        v_context: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        scale: float | None = None,
    ) -> Tensor: ...


class Patches(Protocol):
    """Patch rows of images: ``pixels`` uint8 -> (P, C * patch_size**2).

    ``cu_seqlens`` is (N + 1,), ``widths`` is (N,).
    """

    def __call__(  # noqa: D102
        self,
        pixels: Tensor,
        cu_seqlens: Tensor,
        widths: Tensor,
        patch_size: int,
        rescale_factor: float,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
    ) -> Tensor: ...


class ApplyBitmask(Protocol):
    """Barred tokens: ``logits`` (B, V), ``rows`` (R,), ``bits`` (R, W) int32; in place.

    W is ceil(V / 32). Token v of row ``rows[r]`` is barred if bit v % 32 of ``bits[r, v // 32]`` is 0.
    """

    def __call__(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None: ...  # noqa: D102


class Sample(Protocol):
    """Sampling: ``logits`` (B, V) -> one token a row (B,) int64.

    The parameters, ``seed`` and ``index`` are (B,) each.
    """

    def __call__(  # noqa: D102
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        index: Tensor,
        *,
        min_p_first: bool = True,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation."""

    linear: Linear
    # ``linear`` followed by GELU in the tanh form.
    linear_gelu: Linear
    nf4_quantize: NF4Quantize
    nf4_dequantize: NF4Dequantize
    nf4_matmul: NF4Matmul
    lora_linear: LoraLinear
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    layer_norm: LayerNorm
    add_layer_norm: AddLayerNorm
    silu_mul: SiluMul
    gelu_tanh: GeluTanh
    rotary: Rotary
    rotary_and_cache: RotaryAndCache
    flash_attention: FlashAttention
    paged_attention: PagedAttention
    perceiver_attention: PerceiverAttention
    patches: Patches
    apply_bitmask: ApplyBitmask
    sample: Sample


def make_missing(name: str, table: str = "TRITON", reference: str = "REFERENCE") -> Any:
    """Return a function that raises: ``table`` does not have the operation ``name``."""

    def raise_missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise MissingOperationError(
            f"{table} has no {name!r} here: use {reference}, or "
            f"dataclasses.replace({table}, {name}={reference}.{name})"
        )

    return raise_missing


def _inference_only(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``kernel`` so that it raises where autograd would need its gradient."""

    @wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Inference disables gradients, so the arguments are not inspected then.
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise NoGradientError(
                        f"TRITON's {name!r} has no gradient, got an input that requires one: "
                        "use REFERENCE to train, or torch.no_grad()"
                    )
        return kernel(*args, **kwargs)

    return call


def triton_kernels() -> dict[str, Any]:
    """Return the operations that have a Triton kernel by name, or none without Triton."""
    if find_spec("triton") is None:
        return {}
    from idefics2_kernels import activation, apply_bitmask, lora_linear, patches, rotary, sample
    from idefics2_kernels.attention import flash_attention, paged_attention, perceiver_attention
    from idefics2_kernels.matmul import linear
    from idefics2_kernels.nf4 import nf4_matmul, nf4_quantize
    from idefics2_kernels.norms import layer_norm, rms_norm

    return {
        "linear": linear.linear,
        "linear_gelu": linear.linear_gelu,
        "nf4_quantize": nf4_quantize.nf4_quantize,
        "nf4_dequantize": nf4_quantize.nf4_dequantize,
        "nf4_matmul": nf4_matmul.nf4_matmul,
        "lora_linear": lora_linear.lora_linear,
        "rms_norm": rms_norm.rms_norm,
        "add_rms_norm": rms_norm.add_rms_norm,
        "layer_norm": layer_norm.layer_norm,
        "add_layer_norm": layer_norm.add_layer_norm,
        "silu_mul": activation.silu_mul,
        "gelu_tanh": activation.gelu_tanh,
        "rotary": rotary.rotary,
        "rotary_and_cache": rotary.rotary_and_cache,
        "flash_attention": flash_attention.flash_attention,
        "paged_attention": paged_attention.paged_attention,
        "perceiver_attention": perceiver_attention.perceiver_attention,
        "patches": patches.patches,
        "apply_bitmask": apply_bitmask.apply_bitmask,
        "sample": sample.sample,
    }


def make_triton_ops() -> Ops:
    """Return the table of kernels, which raise for inputs that require a gradient."""
    kernels = {name: _inference_only(name, kernel) for name, kernel in triton_kernels().items()}
    return Ops(
        **{field.name: kernels.get(field.name, make_missing(field.name)) for field in fields(Ops)}
    )


def _make_reference_ops() -> Ops:
    functions = vars(operations) | vars(attention) | vars(sampling) | vars(nf4) | vars(low_rank)
    return Ops(**{field.name: functions[field.name] for field in fields(Ops)})


REFERENCE = _make_reference_ops()
ROW_BY_ROW = replace(
    REFERENCE,
    linear=row_by_row.linear,
    linear_gelu=row_by_row.linear_gelu,
    nf4_matmul=row_by_row.nf4_matmul,
    lora_linear=row_by_row.lora_linear,
    flash_attention=row_by_row.flash_attention,
    perceiver_attention=row_by_row.perceiver_attention,
    paged_attention=row_by_row.paged_attention,
)
TRITON = make_triton_ops()
