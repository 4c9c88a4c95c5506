"""Operations with a gradient: a table of operations joined with a table of their gradients.

Each operation that has a gradient becomes a function that autograd records. It keeps its inputs or
outputs and nothing that the gradient can compute again. Operations without a gradient stay as they
are: those of ``TRITON`` reject inputs that require one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels.gradients import Gradients
from idefics2_kernels.nf4.nf4_weight import NF4Weight
from idefics2_kernels.ops import NoGradientError, Ops

Needs = tuple[bool, ...]
Saved = tuple[Tensor, ...]
# A gradient or None for each input. The table's functions return tuples of fixed lengths.
Found = Any


class _Recorded(torch.autograd.Function):
    """A call whose backward pass is a function of the saved tensors and the results' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[], tuple[Any, Saved]],
        backward: Callable[..., Found],
        *_inputs: Tensor | None,
    ) -> Any:
        """Return the results of ``run``, which also returns the tensors to save."""
        results, saved = run()
        ctx.save_for_backward(*saved)
        ctx.rule = backward
        # The gradient of a result that nothing uses is None.
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        """Return the gradients of the inputs."""
        # Autograd enables gradients here only if the gradient is to be differentiated itself.
        if torch.is_grad_enabled():
            raise NoGradientError(
                "operations of differentiable have no second derivative: "
                "create_graph must be False, got True"
            )
        rows = (_with_rows(dout) for dout in douts)
        return None, None, *ctx.rule(ctx.needs_input_grad[2:], ctx.saved_tensors, *rows)


def _with_rows(dout: Tensor | None) -> Tensor | None:
    """Return ``dout`` with a contiguous last axis, which an expanded gradient does not have."""
    if dout is None or not dout.ndim or dout.stride(-1) == 1 or dout.shape[-1] <= 1:
        return dout
    return dout.contiguous()


def _record(
    run: Callable[[], tuple[Any, Saved]], backward: Callable[..., Found], *inputs: Tensor | None
) -> Any:
    return _Recorded.apply(run, backward, *inputs)  # type: ignore[no-untyped-call]


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _refuse(operation: str, name: str, tensor: Tensor | None) -> None:
    if _needs_gradient(tensor):
        raise NoGradientError(
            f"{operation!r} has no gradient of {name}, got one that requires it: "
            "detach it, or use requires_grad_(False)"
        )


def differentiable(ops: Ops, gradients: Gradients) -> Ops:
    """Return ``ops`` with autograd's history, whose backward pass calls ``gradients``.

    A model that is built with the result trains: ``Idefics2(config, ops)``. Operations without a
    gradient are those of ``ops``. A second derivative raises an error.
    """
    joined = _Joined(ops, gradients)
    return replace(
        ops,
        linear=joined.linear,
        linear_gelu=joined.linear_gelu,
        nf4_matmul=joined.nf4_matmul,
        lora_linear=joined.lora_linear,
        rms_norm=joined.rms_norm,
        add_rms_norm=joined.add_rms_norm,
        layer_norm=joined.layer_norm,
        add_layer_norm=joined.add_layer_norm,
        silu_mul=joined.silu_mul,
        gelu_tanh=joined.gelu_tanh,
        rotary=joined.rotary,
        flash_attention=joined.flash_attention,
        perceiver_attention=joined.perceiver_attention,
    )


def linear_cross_entropy(
    gradients: Gradients,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy of ``hidden`` (T, K) times the head ``weight`` (V, K).

    Rows whose target (T,) is -100 have no loss. The sum is divided by ``num_items``, as ``Trainer``
    counts them over several batches, or by the number of targets. Without targets the loss is 0 and
    so are its gradients, where ``torch.nn.functional.cross_entropy`` returns NaN.
    """

    def run() -> tuple[Tensor, Saved]:
        total, count, dhidden, dweight = gradients.linear_cross_entropy(
            hidden, weight, targets, weight_grad=_needs_weight
        )
        items = torch.as_tensor(max(count, 1) if num_items is None else num_items)
        items = items.to(total.device, total.dtype)
        kept = (dhidden, items) if dweight is None else (dhidden, items, dweight)
        return total / items, kept

    def backward(needs: Needs, saved: Saved, dloss: Tensor) -> Found:
        dhidden, items, *rest = saved
        factor = dloss / items
        dweight = (rest[0] * factor).to(rest[0].dtype) if needs[1] else None
        return (dhidden * factor).to(dhidden.dtype) if needs[0] else None, dweight

    _needs_weight = _needs_gradient(weight)
    loss: Tensor = _record(run, backward, hidden, weight)
    return loss


class _Joined:
    """The operations of one table with the gradients of another, each as ``Ops`` has it."""

    def __init__(self, ops: Ops, gradients: Gradients) -> None:
        self.ops = ops
        # The saved tensors are arguments in the order of each gradient's signature.
        self.gradients: Any = gradients

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def run() -> tuple[Tensor, Saved]:
            saved = (weight, x) if needs_weight else (weight,)
            return self.ops.linear(x, weight, bias), saved

        def backward(needs: Needs, saved: Saved, dy: Tensor) -> Found:
            return self.gradients.linear(
                dy,
                saved[1] if needs[1] else None,
                saved[0],
                weight_grad=needs[1],
                bias_grad=needs[2],
            )

        needs_weight = _needs_gradient(weight)
        y: Tensor = _record(run, backward, x, weight, bias)
        return y

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _needs_gradient(x, weight, bias):
            return self.gelu_tanh(self.linear(x, weight, bias))
        return self.ops.linear_gelu(x, weight, bias)

    def nf4_matmul(self, x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
        def backward(_needs: Needs, _saved: Saved, dy: Tensor) -> Found:
            return (self.gradients.nf4_matmul(dy, weight),)

        _refuse("nf4_matmul", "bias", bias)
        y: Tensor = _record(lambda: (self.ops.nf4_matmul(x, weight, bias), ()), backward, x)
        return y

    def lora_linear(
        self,
        x: Tensor,
        base: Tensor | NF4Weight,
        a: Tensor,
        b: Tensor,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        def run() -> tuple[Tensor, Saved]:
            saved = (a, b, x) if trains else (a, b)
            return self.ops.lora_linear(x, base, a, b, scale, bias), saved

        def backward(_needs: Needs, saved: Saved, dy: Tensor) -> Found:
            kept = saved[2] if trains else None
            return self.gradients.lora_linear(dy, kept, base, *saved[:2], scale, pair_grad=trains)

        if isinstance(base, Tensor):
            _refuse("lora_linear", "base", base)
        _refuse("lora_linear", "bias", bias)
        trains = _needs_gradient(a, b)
        y: Tensor = _record(run, backward, x, a, b)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        def backward(needs: Needs, saved: Saved, dy: Tensor) -> Found:
            return self.gradients.rms_norm(dy, *saved, eps, weight_grad=needs[1])

        run = lambda: (self.ops.rms_norm(x, weight, eps), (x, weight))  # noqa: E731
        y: Tensor = _record(run, backward, x, weight)
        return y

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        def run() -> tuple[tuple[Tensor, Tensor], Saved]:
            y, total = self.ops.add_rms_norm(x, residual, weight, eps)
            return (y, total), (total, weight)

        def backward(needs: Needs, saved: Saved, dy: Tensor | None, dsum: Tensor | None) -> Found:
            if dy is None:
                return dsum, dsum, None
            dx, dweight = self.gradients.rms_norm(dy, *saved, eps, dsum, weight_grad=needs[2])
            return dx, dx, dweight

        y, total = _record(run, backward, x, residual, weight)
        return y, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        def backward(needs: Needs, saved: Saved, dy: Tensor) -> Found:
            return self.gradients.layer_norm(dy, *saved, eps, weight_grad=needs[1] or needs[2])

        run = lambda: (self.ops.layer_norm(x, weight, bias, eps), (x, weight, bias))  # noqa: E731
        y: Tensor = _record(run, backward, x, weight, bias)
        return y

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        def run() -> tuple[tuple[Tensor, Tensor], Saved]:
            y, total = self.ops.add_layer_norm(x, residual, weight, bias, eps)
            return (y, total), (total, weight, bias)

        def backward(needs: Needs, saved: Saved, dy: Tensor | None, dsum: Tensor | None) -> Found:
            if dy is None:
                return dsum, dsum, None, None
            dx, dweight, dbias = self.gradients.layer_norm(
                dy, *saved, eps, dsum, weight_grad=needs[2] or needs[3]
            )
            return dx, dx, dweight, dbias

        y, total = _record(run, backward, x, residual, weight, bias)
        return y, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        def backward(_needs: Needs, saved: Saved, dy: Tensor) -> Found:
            return (self.gradients.silu_mul(dy, *saved),)

        y: Tensor = _record(lambda: (self.ops.silu_mul(gate_up), (gate_up,)), backward, gate_up)
        return y

    def gelu_tanh(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        def backward(_needs: Needs, saved: Saved, dy: Tensor) -> Found:
            return (self.gradients.gelu_tanh(dy, saved[0], bias),)

        _refuse("gelu_tanh", "bias", bias)
        y: Tensor = _record(lambda: (self.ops.gelu_tanh(x, bias), (x,)), backward, x)
        return y

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        def backward(_needs: Needs, saved: Saved, dq: Tensor | None, dk: Tensor | None) -> Found:
            zeros = (torch.zeros(x, dtype=q_dtype, device=cos_sin.device) for x in shapes)
            dq, dk = (z if d is None else d for d, z in zip((dq, dk), zeros, strict=True))
            return self.gradients.rotary(dq, dk, *saved)

        _refuse("rotary", "cos_sin", cos_sin)
        shapes, q_dtype = (q.shape, k.shape), q.dtype
        run = lambda: (self.ops.rotary(q, k, positions, cos_sin), (positions, cos_sin))  # noqa: E731
        rotated_q, rotated_k = _record(run, backward, q, k)
        return rotated_q, rotated_k

    def flash_attention(
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
    ) -> Tensor:
        def run() -> tuple[Tensor, Saved]:
            shape, dtype = (q.shape[1], q.shape[0]), torch.promote_types(q.dtype, torch.float32)
            sums = torch.empty(shape, dtype=dtype, device=q.device) if lse is None else lse
            out = self.ops.flash_attention(q, k, v, cu_seqlens, max_seqlen, **options, lse=sums)
            return out, (q, k, v, out, sums, cu_seqlens)

        def backward(_needs: Needs, saved: Saved, dout: Tensor) -> Found:
            return self.gradients.flash_attention(dout, *saved, max_seqlen, **options)

        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
        if not _needs_gradient(q, k, v):
            return self.ops.flash_attention(q, k, v, cu_seqlens, max_seqlen, **options, lse=lse)
        out: Tensor = _record(run, backward, q, k, v)
        return out

    def perceiver_attention(
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
    ) -> Tensor:
        inputs = (q, k_context, v_context, k_latents, v_latents)

        def run() -> tuple[Tensor, Saved]:
            out = self.ops.perceiver_attention(*inputs, cu_seqlens, max_seqlen, scale=scale)
            return out, (*inputs, cu_seqlens)

        def backward(_needs: Needs, saved: Saved, dout: Tensor) -> Found:
            return self.gradients.perceiver_attention(dout, *saved, max_seqlen, scale=scale)

        out: Tensor = _record(run, backward, *inputs)
        return out
