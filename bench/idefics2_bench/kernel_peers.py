"""Peers of the kernels: attention backends, cuBLAS, PyTorch's own operations, bitsandbytes.

A peer prepares a case's inputs (a padded cache, a mask, quantized weights) and returns the call to
time. It returns ``None`` if it cannot run the case.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from idefics2_bench.gradient_peers import GRADIENT_PEERS
from idefics2_kernels import REFERENCE, NF4Weight
from idefics2_kernels.catalog import Inputs
from idefics2_kernels.reference.operations import rotary

Call = Callable[[], object]
Peer = Callable[[Inputs], Call | None]


def _equal_lengths(inputs: Inputs) -> tuple[int, int] | None:
    """Return (sequences, length) if all sequences have the same length, else ``None``.

    Kernels for rectangular batches need equal lengths.
    """
    B = inputs["cu_seqlens"].shape[0] - 1
    tokens = inputs["k"].shape[0] if "k" in inputs else inputs["k_context"].shape[0]
    length: int = inputs["max_seqlen"]
    return (B, length) if B * length == tokens else None


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Call:
    def call() -> object:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    return call


def _flash_sdpa(backend: SDPBackend) -> Peer:
    def prepare(inputs: Inputs) -> Call | None:
        window, shape = inputs.get("window"), _equal_lengths(inputs)
        if shape is None or (window is not None and window < shape[1]):
            return None
        q, k, v = (
            inputs[name].unflatten(0, shape).transpose(1, 2).contiguous()
            for name in ("q", "k", "v")
        )
        return _sdpa(backend, q, k, v, is_causal=inputs["causal"], scale=inputs.get("scale"))

    return prepare


def _flex(inputs: Inputs) -> Call | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = _equal_lengths(inputs)
    if shape is None:
        return None
    causal, window = inputs["causal"], inputs.get("window")
    q, k, v = (
        inputs[name].unflatten(0, shape).transpose(1, 2).contiguous() for name in ("q", "k", "v")
    )

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j if causal else (i - j).abs() >= 0
        return seen if window is None else seen & ((i - j).abs() < window)

    mask = create_block_mask(visible, None, None, shape[1], shape[1], device=q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True, scale=inputs.get("scale"))


def _perceiver_sdpa(backend: SDPBackend) -> Peer:
    def prepare(inputs: Inputs) -> Call | None:
        shape = _equal_lengths(inputs)
        if shape is None:
            return None
        k, v = (
            torch.cat([inputs[f"{t}_context"].unflatten(0, shape), inputs[f"{t}_latents"]], 1)
            .transpose(1, 2)
            .contiguous()
            for t in ("k", "v")
        )
        return _sdpa(backend, inputs["q"].transpose(1, 2).contiguous(), k, v)

    return prepare


def _decode_sdpa(backend: SDPBackend) -> Peer:
    """Return a peer on keys and values (B, H_KV, S, D), as a cache without pages stores them.

    They are copied from their pages once, before timing.
    """

    def prepare(inputs: Inputs) -> Call | None:
        lengths = set(inputs["context_lens"].tolist())
        B = inputs["block_table"].shape[0]
        window = inputs.get("window")
        if inputs["q"].shape[0] != B or len(lengths) != 1 or (window and window < max(lengths)):
            return None
        (length,) = lengths
        page_size = inputs["k_cache"].shape[2]
        table = inputs["block_table"][:, : -(-length // page_size)].long()
        k, v = (
            inputs[name][table]
            .transpose(2, 3)
            .flatten(1, 2)[:, :length]
            .transpose(1, 2)
            .contiguous()
            for name in ("k_cache", "v_cache")
        )
        return _sdpa(backend, inputs["q"][:, :, None], k, v)

    return prepare


def _cublas(inputs: Inputs) -> Call:
    return lambda: functional.linear(inputs["x"], inputs["weight"], inputs.get("bias"))


def _cublas_gelu(inputs: Inputs) -> Call:
    return lambda: functional.gelu(
        functional.linear(inputs["x"], inputs["weight"], inputs.get("bias")), approximate="tanh"
    )


def _bitsandbytes_matmul(inputs: Inputs) -> Call | None:
    try:
        from bitsandbytes import functional as bnb
        from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
    except ImportError:
        return None
    dense = REFERENCE.nf4_dequantize(inputs["weight"])
    codes, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return lambda: matmul_4bit(inputs["x"], codes.t(), quant_state=state)


def _bitsandbytes_lora(inputs: Inputs) -> Call | None:
    """Compute the product as PEFT does on bitsandbytes' layers."""
    if not isinstance(inputs["base"], NF4Weight):
        return None
    product = _bitsandbytes_matmul({"x": inputs["x"], "weight": inputs["base"]})
    return None if product is None else _beside(product, inputs)


def _cublas_lora(inputs: Inputs) -> Call:
    """Compute the product of a 16-bit base, which an NF4 base is dequantized to beforehand."""
    base = inputs["base"]
    weight = REFERENCE.nf4_dequantize(base) if isinstance(base, NF4Weight) else base
    return _beside(lambda: functional.linear(inputs["x"], weight, inputs["bias"]), inputs)


def _beside(product: Call, inputs: Inputs) -> Call:
    x, a, b, scale = (inputs[name] for name in ("x", "a", "b", "scale"))
    return lambda: product() + functional.linear(functional.linear(x, a), b) * scale


def _torch(function: Callable[..., object], *names: str) -> Peer:
    def prepare(inputs: Inputs) -> Call:
        return lambda: function(*(inputs[name] for name in names))

    return prepare


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> object:
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> object:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def _gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias, approximate="tanh")


def _apply_bitmask(inputs: Inputs) -> Call:
    """Unpack the bits and fill, as far as PyTorch can do it without waiting for the device."""
    logits, rows, bits = inputs["logits"], inputs["rows"], inputs["bits"]
    places = torch.arange(32, device=bits.device, dtype=torch.int32)

    def call() -> Tensor:
        is_barred = (bits[:, :, None] >> places & 1).flatten(1)[:, : logits.shape[1]] == 0
        filled: Tensor = logits.index_copy_(
            0, rows, logits[rows].masked_fill(is_barred, float("-inf"))
        )
        return filled

    return call


def _sample(inputs: Inputs) -> Call:
    """Sample by sorting all logits. min-p is left out, because no timed case uses it."""

    def call() -> Tensor:
        scores = inputs["logits"].float() / inputs["temperature"].clamp(min=1e-5)[:, None]
        scores, order = scores.sort(-1, descending=True)
        top_k = torch.where(inputs["top_k"] > 0, inputs["top_k"], scores.shape[1])
        ranks = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(ranks >= top_k[:, None], float("-inf"))
        weights = scores.softmax(-1)
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before > inputs["top_p"][:, None], 0.0)
        # An exponential race draws on the device. ``multinomial`` would wait for the device.
        places = (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
        drawn: Tensor = order.gather(-1, places)[:, 0]
        return drawn

    return call


PEERS: dict[str, dict[str, Peer]] = {
    "flash_attention": {
        "torch-flash2": _flash_sdpa(SDPBackend.FLASH_ATTENTION),
        "torch-cudnn": _flash_sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch-flex": _flex,
    },
    "perceiver_attention": {
        "torch-flash2": _perceiver_sdpa(SDPBackend.FLASH_ATTENTION),
        "torch-cudnn": _perceiver_sdpa(SDPBackend.CUDNN_ATTENTION),
    },
    "paged_attention": {
        "torch-flash2": _decode_sdpa(SDPBackend.FLASH_ATTENTION),
        "torch-cudnn": _decode_sdpa(SDPBackend.CUDNN_ATTENTION),
    },
    "linear": {"cublas": _cublas},
    "linear_gelu": {"cublas": _cublas_gelu},
    "nf4_matmul": {"bitsandbytes": _bitsandbytes_matmul},
    "lora_linear": {"bitsandbytes": _bitsandbytes_lora, "cublas": _cublas_lora},
    "rms_norm": {"torch": _torch(_rms_norm, "x", "weight", "eps")},
    "add_rms_norm": {"torch": _torch(_add_rms_norm, "x", "residual", "weight", "eps")},
    "layer_norm": {"torch": _torch(_layer_norm, "x", "weight", "bias", "eps")},
    "add_layer_norm": {"torch": _torch(_add_layer_norm, "x", "residual", "weight", "bias", "eps")},
    "silu_mul": {"torch": _torch(_silu_mul, "gate_up")},
    "gelu_tanh": {"torch": _torch(_gelu_tanh, "x", "bias")},
    "apply_bitmask": {"torch": _apply_bitmask},
    "sample": {"torch-sort": _sample},
    "rotary": {"torch": _torch(rotary, "q", "k", "positions", "cos_sin")},
    **GRADIENT_PEERS,
}
"""The peers of each operation, by name. An operation without an entry is timed alone."""


def prepared(kernel: str, inputs: Inputs) -> dict[str, Call]:
    """Return the calls of the peers of operation ``kernel`` that can run ``inputs``, by name."""
    found = {}
    for name, peer in PEERS.get(kernel, {}).items():
        call = _runnable(peer, inputs)
        if call is not None:
            found[name] = call
    return found


def _runnable(peer: Peer, inputs: Inputs) -> Call | None:
    try:
        call = peer(inputs)
        if call is not None:
            call()
    # A backend that does not support the shape raises "No available kernel", and an operation that
    # this device does not have NotImplementedError
    except RuntimeError:
        return None
    return call
