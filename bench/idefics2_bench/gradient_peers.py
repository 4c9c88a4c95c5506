"""Peers of the gradients: PyTorch's own backward operations, cuBLAS, bitsandbytes.

A peer calls the operations that autograd would call, without autograd, which cannot be captured in
a CUDA graph after a forward pass on another stream.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idefics2_kernels import REFERENCE, REFERENCE_GRADIENTS, NF4Weight
from idefics2_kernels.catalog import Inputs

Call = Callable[[], object]
Peer = Callable[[Inputs], Call | None]

aten: Any = torch.ops.aten
# The reduction of a loss to its sum.
_SUM = 2


def _square(inputs: Inputs) -> dict[str, Tensor] | None:
    """Return the tensors as (B, heads, S, D), or ``None`` if lengths differ or a window counts."""
    B, length = inputs["cu_seqlens"].shape[0] - 1, inputs["max_seqlen"]
    window = inputs.get("window")
    if B * length != inputs["q"].shape[0] or (window is not None and window < length):
        return None
    names = ("q", "k", "v", "dout")
    return {
        name: inputs[name].unflatten(0, (B, length)).transpose(1, 2).contiguous() for name in names
    }


def _cudnn(inputs: Inputs) -> Call | None:
    square = _square(inputs)
    if square is None:
        return None
    q, k, v, dout = square.values()
    causal, scale = inputs["causal"], inputs.get("scale")
    out, lse, *rest = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
    return lambda: aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal,
        scale=scale,
    )  # fmt: skip


def _flash(inputs: Inputs) -> Call | None:
    square = _square(inputs)
    # Heads of other sizes are padded by PyTorch outside of this operation.
    if square is None or square["q"].shape[-1] % 8:
        return None
    q, k, v, dout = square.values()
    causal, scale = inputs["causal"], inputs.get("scale")
    out, lse, *rest = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
    return lambda: aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset,
        scale=scale,
    )  # fmt: skip


def _linear(inputs: Inputs) -> Call:
    def call() -> object:
        dx = inputs["dy"] @ inputs["weight"]
        if not inputs["weight_grad"]:
            return dx
        return dx, inputs["dy"].flatten(0, -2).t() @ inputs["x"].flatten(0, -2)

    return call


def _dense_product(inputs: Inputs) -> Call:
    """Return cuBLAS's product by the same weight in 16 bits."""
    dense = REFERENCE.nf4_dequantize(inputs["weight"])
    return lambda: inputs["dy"] @ dense


def _bitsandbytes(inputs: Inputs) -> Call | None:
    try:
        from bitsandbytes import functional as bnb
    except ImportError:
        return None
    dense = REFERENCE.nf4_dequantize(inputs["weight"])
    codes, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return lambda: inputs["dy"] @ bnb.dequantize_4bit(codes, state)


def _bitsandbytes_lora(inputs: Inputs) -> Call | None:
    """Compute the gradients as PEFT does on bitsandbytes' layers."""
    if not isinstance(inputs["base"], NF4Weight):
        return None
    base = _bitsandbytes({"dy": inputs["dy"], "weight": inputs["base"]})
    if base is None:
        return None
    dy, x, a, b, scale = (inputs[name] for name in ("dy", "x", "a", "b", "scale"))
    # Autograd keeps what the first layer returned
    xa = x @ a.t()

    def call() -> object:
        scaled = dy * scale
        dxa = scaled @ b
        return base() + dxa @ a, dxa.t() @ x, scaled.t() @ xa

    return call


def _rms_norm(inputs: Inputs) -> Call:
    x, weight, dy, dsum = (inputs[name] for name in ("x", "weight", "dy", "dsum"))
    rstd = aten._fused_rms_norm(x, list(weight.shape), weight, inputs["eps"])[1]
    wanted = [True, inputs["weight_grad"]]

    def call() -> object:
        dx, dweight = aten._fused_rms_norm_backward(dy, x, list(weight.shape), rstd, weight, wanted)
        return dx if dsum is None else dx + dsum, dweight

    return call


def _layer_norm(inputs: Inputs) -> Call:
    x, weight, bias, dy, dsum = (inputs[name] for name in ("x", "weight", "bias", "dy", "dsum"))
    shape = list(weight.shape)
    mean, rstd = aten.native_layer_norm(x, shape, weight, bias, inputs["eps"])[1:]
    wanted = [True, inputs["weight_grad"], inputs["weight_grad"]]

    def call() -> object:
        dx, *others = aten.native_layer_norm_backward(
            dy, x, shape, mean, rstd, weight, bias, wanted
        )
        return dx if dsum is None else dx + dsum, others

    return call


def _silu_mul(inputs: Inputs) -> Call:
    gate, up = inputs["gate_up"].chunk(2, -1)
    dy, activated = inputs["dy"], torch.nn.functional.silu(gate)
    return lambda: torch.cat([aten.silu_backward(dy * up, gate), dy * activated], -1)


def _gelu_tanh(inputs: Inputs) -> Call:
    """Return torch's gradient from the same tensors, of which ``x`` is without the bias."""
    x, bias = inputs["x"], inputs["bias"]

    def call() -> object:
        total = x if bias is None else x + bias
        return aten.gelu_backward(inputs["dy"], total, approximate="tanh")

    return call


def _gelu_tanh_of_sum(inputs: Inputs) -> Call:
    """Return torch's gradient from a sum with the bias that the forward pass has kept."""
    x, bias = inputs["x"], inputs["bias"]
    total = x if bias is None else x + bias
    return lambda: aten.gelu_backward(inputs["dy"], total, approximate="tanh")


def _rotary(inputs: Inputs) -> Call:
    return lambda: REFERENCE_GRADIENTS.rotary(**inputs)


def _linear_cross_entropy(inputs: Inputs) -> Call:
    """Return the loss of whole logits in fp32, and its gradients, as autograd computes them."""
    hidden, weight, targets = (inputs[name] for name in ("hidden", "weight", "targets"))
    targets = targets.long()

    def call() -> object:
        logits = torch.nn.functional.linear(hidden, weight)
        logs = torch.log_softmax(logits.float(), -1)
        loss, count = aten.nll_loss_forward(logs, targets, None, _SUM, -100)
        dlogs = aten.nll_loss_backward(loss, logs, targets, None, _SUM, -100, count)
        dlogits = aten._log_softmax_backward_data(dlogs, logs, -1, torch.float32).to(hidden.dtype)
        dweight = dlogits.t() @ hidden if inputs["weight_grad"] else None
        return loss, dlogits @ weight, dweight

    return call


GRADIENT_PEERS: dict[str, dict[str, Peer]] = {
    "flash_attention_backward": {"torch-flash2": _flash, "torch-cudnn": _cudnn},
    "linear_backward": {"cublas": _linear},
    "lora_linear_backward": {"bitsandbytes": _bitsandbytes_lora},
    "nf4_matmul_backward": {"cublas": _dense_product, "bitsandbytes": _bitsandbytes},
    "rms_norm_backward": {"torch": _rms_norm},
    "layer_norm_backward": {"torch": _layer_norm},
    "silu_mul_backward": {"torch": _silu_mul},
    "gelu_tanh_backward": {"torch": _gelu_tanh, "torch-kept-sum": _gelu_tanh_of_sum},
    "rotary_backward": {"torch": _rotary},
    "linear_cross_entropy": {"torch": _linear_cross_entropy},
}
"""The peers of each gradient, by name."""
