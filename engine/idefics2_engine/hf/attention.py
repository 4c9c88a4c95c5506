"""The attention and the mask that transformers calls as ``attn_implementation="idefics2"``.

All three towers call one function with padded tensors, and a mask (B, S) that a second function
makes. Padding is removed, and an operation of ``Ops`` computes the rest:

| call | operation |
|---|---|
| vision: Q = S patches, not causal | ``flash_attention`` |
| perceiver: Q latents, S = patches + latents | ``perceiver_attention`` |
| text without past: Q = S tokens, causal | ``flash_attention`` with the window |
| all else: decoding, masks of four axes, dropout | transformers' ``sdpa`` |

transformers' ``sdpa`` masks serve all else, so a cache of any kind is attended to as in
transformers. Importing this module registers both functions. A model without a registered mask
would get ``None`` for every mask, and would attend to padding without an error.

Decoding with a ``PagedCache`` does not call that function. The text model's attention (``blocks``)
calls ``paged_attention``, for rows that begin behind the ``left_padding`` of the mask.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverAttention

from idefics2_engine.hf.operations import operations_of
from idefics2_engine.hf.packed_rows import LeftPadding, PackedRows, RowsOfMasks
from idefics2_kernels import Ops

NAME = "idefics2"
"""The value of ``attn_implementation``."""

_MASKS = RowsOfMasks()
_LEFT_PADDING = LeftPadding()


def make_mask(q_length: int, kv_length: int, **arguments: Any) -> Tensor | None:
    """Make the mask of one forward, with the arguments of transformers' mask functions.

    The result is ``None`` if nothing is masked but what is causal, or (B, S) for padding alone. For
    all else (decoding, packed sequences, masks of the caller's own) it is transformers' mask for
    ``sdpa``, (B, 1, Q, S) or ``None``.
    """
    # transformers forbids the skips where more is masked than padding and, if causal, what follows
    if torch.compiler.is_compiling():
        is_plain = False
    elif arguments.get("allow_is_bidirectional_skip", False):
        is_plain = True
    else:
        is_plain = (
            arguments.get("allow_is_causal_skip", True)
            and q_length == kv_length
            and bool(arguments.get("q_offset", 0) == arguments.get("kv_offset", 0))
        )
    make: Any = flash_attention_mask if is_plain else sdpa_mask
    mask: Tensor | None = make(q_length=q_length, kv_length=kv_length, **arguments)
    # What is remembered cannot be traced
    if mask is None or torch.compiler.is_compiling():
        return mask
    if mask.ndim == 2:
        _MASKS.remember(mask)
    elif _ends_with_queries(q_length, kv_length, **arguments):
        kept = arguments.get("attention_mask")
        _LEFT_PADDING.remember(mask, None if kept is None else kept[:, -kv_length:])
    return mask


def _ends_with_queries(
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> bool:
    """Return whether queries have the last keys, and only padding and what follows is masked.

    The offset of a static cache is a tensor, and such a cache has keys behind the queries'.
    """
    return (
        allow_is_causal_skip
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
    )


def left_padding(mask: Tensor) -> Tensor | None:
    """Return how much of each row's left is padding, (B,) int64, for a mask of ``make_mask``.

    The result is ``None`` if ``mask`` hides more than that and what follows each query.
    """
    return _LEFT_PADDING.of(mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedRows | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend ``query`` (B, H, Q, D) to ``key`` and ``value`` (B, H_KV, S, D): (B, Q, H, D).

    Args:
        module: The attention module of transformers.
        query: Queries, rotated if the model has rotary positions.
        key: Keys.
        value: Values.
        attention_mask: ``None``, (B, S) with zeros on padding, or transformers' mask (B, 1, Q, S).
            ``PackedRows`` if B = 1 and its rows follow each other without padding.
        scaling: The factor of the scores.
        dropout: The probability of dropout.
        is_causal: Whether a query sees only keys up to its own. If ``None``, what ``module`` says.
        sliding_window: How many keys a query sees, its own included.
        **kwargs: What else transformers passes.

    Raises:
        ValueError: Attention weights were asked for, or the mask has another shape.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions must come with attn_implementation='eager', got {NAME!r}, "
            "which has no attention weights"
        )
    (B, _, Q, _), S = query.shape, key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = None if sliding_window is None or sliding_window >= S else sliding_window
    ops = None if dropout else operations_of(module).for_call(query, key, value)
    if isinstance(attention_mask, PackedRows):
        # Whoever packs rows has asked for operations before
        assert ops is not None
        rows = attention_mask
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        out = ops.flash_attention(
            q, k, v, rows.cu_seqlens, rows.max_seqlen, causal=causal, window=window, scale=scaling
        )
        return out[None], None
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != (B, S):
        raise ValueError(
            f"attention_mask must be {(B, S)} for these keys, got {tuple(attention_mask.shape)}"
        )
    if ops is not None and (attention_mask is None or attention_mask.ndim == 2):
        if isinstance(module, Idefics2PerceiverAttention):
            return _perceive(ops, query, key, value, attention_mask, scaling), None
        if Q == S:
            if attention_mask is None:
                rows = PackedRows.whole(B, S, query.device)
            else:
                rows = _MASKS.rows(attention_mask, S)
            # In packed rows a window would reach further than in padded ones with gaps
            if window is None or not rows.has_gaps:
                q, k, v = (rows.pack(t.transpose(1, 2)) for t in (query, key, value))
                out = ops.flash_attention(
                    q, k, v, rows.cu_seqlens, rows.max_seqlen,
                    causal=causal, window=window, scale=scaling,
                )  # fmt: skip
                return rows.unpack(out), None
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        _sdpa_mask(attention_mask, Q, S, causal, window, query.device),
        dropout=dropout,
        scaling=scaling,
        is_causal=causal,
        **kwargs,
    )
    return out, None


def _perceive(
    ops: Ops, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend latents ``query`` (B, H, L, D) to patches and latents: (B, L, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    patches = k.shape[1] - q.shape[1]
    if mask is None:
        rows = PackedRows.whole(len(q), patches, q.device)
    else:
        rows = _MASKS.rows(mask, patches)
    return ops.perceiver_attention(
        q,
        rows.pack(k[:, :patches]),
        rows.pack(v[:, :patches]),
        k[:, patches:],
        v[:, patches:],
        rows.cu_seqlens,
        rows.max_seqlen,
        scale=scale,
    )


def _sdpa_mask(
    mask: Tensor | None, Q: int, S: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Return the mask (B, 1, Q or 1, S) by which ``sdpa`` computes the same."""
    if mask is not None and mask.ndim == 4:
        return mask
    if mask is None and (Q != S or not causal or window is None):
        # ``sdpa`` knows what is causal
        return None
    visible = None if mask is None else mask.bool()[:, None, None]
    if causal:
        distance = torch.arange(S - Q, S, device=device)[:, None] - torch.arange(S, device=device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        visible = seen[None, None] if visible is None else visible & seen
    return visible


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
