"""transformers' modules with this package's operations: norms, MLPs and the text model.

Each class has the name of the class that it extends, so that whatever asks for a name or for the
class itself finds it: PEFT's ``target_modules``, ``_no_split_modules``, ``isinstance``. Parameters
are unchanged. ``forward`` is transformers' own where ``Operations.for_call`` returns none.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.mistral import modeling_mistral

from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.hooks import is_unhooked
from idefics2_engine.hf.operations import needs_gradients, operations_of
from idefics2_engine.hf.paged_cache import PagedCache
from idefics2_engine.hf.training.kept_attention import CheckpointedLayer


class MistralRMSNorm(modeling_mistral.MistralRMSNorm):
    """The RMS norm of the text model."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``hidden_states`` (..., hidden)."""
        ops = operations_of(self).for_call(hidden_states, self.weight)
        if ops is None:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Idefics2RMSNorm(modeling_idefics2.Idefics2RMSNorm):
    """The RMS norm of the perceiver."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``hidden_states`` (..., hidden)."""
        ops = operations_of(self).for_call(hidden_states, self.weight)
        if ops is None:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(mlp: Any, x: Tensor) -> Tensor | None:
    """Return silu(gate) * up of ``x`` (..., F), or ``None`` where transformers' own must run."""
    ops = operations_of(mlp).for_call(x, module=mlp)
    if ops is None:
        return None
    gate, up = mlp.gate_proj, mlp.up_proj
    if not (_is_plain(gate) and _is_plain(up)):
        return ops.silu_mul(torch.cat([gate(x), up(x)], dim=-1))
    width = gate.out_features
    rows = x.flatten(0, -2)
    stacked = _stacked(gate.weight, up.weight)
    if stacked is not None:
        return ops.silu_mul(rows @ stacked.t()).view(*x.shape[:-1], width)
    if needs_gradients(x, gate.weight, up.weight):
        # Autograd does not record products that are written to given memory
        return ops.silu_mul(torch.cat([gate(x), up(x)], dim=-1))
    # Both products are written to one memory, which saves a copy
    gate_up = x.new_empty(len(rows), 2 * width)
    torch.mm(rows, gate.weight.t(), out=gate_up[:, :width])
    torch.mm(rows, up.weight.t(), out=gate_up[:, width:])
    return ops.silu_mul(gate_up).view(*x.shape[:-1], width)


def _stacked(*weights: Tensor) -> Tensor | None:
    """Return ``weights`` (N, K) as one, if the engine has fused them and none needs a gradient."""
    if needs_gradients(*weights):
        return None
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if (
            weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or weight.data_ptr() != end
            or weight.shape[1] != first.shape[1]
            or not weight.is_contiguous()
        ):
            return None
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _products(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Return what ``layers`` make of ``x`` (..., K), as one product if their weights are fused."""
    if all(map(_is_plain, layers)):
        stacked = _stacked(*(layer.weight for layer in layers))
        if stacked is not None:
            widths = [layer.out_features for layer in layers]
            product: Tensor = nn.functional.linear(x, stacked)
            return tuple(torch.split(product, widths, dim=-1))
    return tuple(layer(x) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether ``layer`` does nothing but multiply by its weight."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        # Quantized and distributed weights are of types of their own
        and type(layer.weight) is nn.Parameter
        and is_unhooked(layer)
    )


class MistralMLP(modeling_mistral.MistralMLP):
    """The gated MLP of the text model."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., hidden) to (..., hidden)."""
        transformers_own: Any = super().forward
        inner = _gated(self, x)
        out: Tensor = transformers_own(x) if inner is None else self.down_proj(inner)
        return out


class Idefics2MLP(modeling_idefics2.Idefics2MLP):
    """The gated MLP of the projection and of the perceiver."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., hidden) to (..., output)."""
        transformers_own: Any = super().forward
        inner = _gated(self, x)
        out: Tensor = transformers_own(x) if inner is None else self.down_proj(inner)
        return out


class RotaryTable(NamedTuple):
    """Rotary angles of a batch, in fp32, whatever the model's dtype."""

    # (1 or B, S, D): D/2 cosines, then D/2 sines
    cos_sin: Tensor
    # (B * S,): the row of the flattened ``cos_sin`` for each token
    rows: Tensor

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (1 or B, S, D) each, as transformers passes them."""
        cos, sin = (torch.cat([half, half], -1).to(dtype) for half in self.cos_sin.chunk(2, -1))
        return cos, sin


class MistralRotaryEmbedding(modeling_mistral.MistralRotaryEmbedding):
    """The angles of a batch, computed once for all layers."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """Return the ``RotaryTable`` of ``x`` (B, S, hidden), or transformers' cosines and sines.

        ``position_ids`` are (1 or B, S).
        """
        transformers_own: Any = super().forward
        if operations_of(self).for_call(x) is None:
            return transformers_own(x, position_ids)
        # transformers rounds to the dtype of its first argument
        cos, sin = transformers_own(x.new_empty(0, dtype=torch.float32), position_ids)
        half = cos.shape[-1] // 2
        cos_sin = torch.cat([cos[..., :half], sin[..., :half]], dim=-1)
        rows = torch.arange(cos_sin[..., 0].numel(), device=x.device)
        return RotaryTable(cos_sin, rows.view(cos_sin.shape[:2]).expand(len(x), -1).flatten())


class MistralAttention(modeling_mistral.MistralAttention):
    """The attention of the text model, with positions from a ``RotaryTable``."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``hidden_states`` (B, S, hidden) to (B, S, hidden), as transformers' ``forward``."""
        table = position_embeddings
        ops = operations_of(self).for_call(hidden_states, module=self)
        if ops is None or not isinstance(table, RotaryTable):
            if isinstance(table, RotaryTable):
                table = table.rounded(hidden_states.dtype)
            return super().forward(hidden_states, table, attention_mask, past_key_values, **kwargs)
        B, S, _ = hidden_states.shape
        q, k, v = (
            product.unflatten(-1, (-1, self.head_dim))
            for product in _products(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        )
        cos_sin = table.cos_sin.flatten(0, 1)
        window = getattr(self.config, "sliding_window", None)
        dropout = self.attention_dropout if self.training else 0.0
        step = None
        if (
            isinstance(past_key_values, PagedCache)
            and self.config._attn_implementation == NAME
            and not dropout
            and not needs_gradients(hidden_states, module=self)
            # ``attend`` refuses them
            and not kwargs.get("output_attentions")
        ):
            step = past_key_values.begin_step(self.layer_idx, k, attention_mask)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        if step is not None:
            memory, tables = step
            q = ops.rotary_and_cache(
                q, k, v, table.rows, cos_sin, memory.keys, memory.values, tables.slots
            )
            out = ops.paged_attention(
                q,
                memory.key_pages,
                memory.value_pages,
                tables.block_table,
                tables.context_lens,
                tables.cu_seqlens,
                S,
                window=window,
                scale=self.scaling,
            )
            return self.o_proj(out.view(B, S, -1)), None
        q, k = ops.rotary(q, k, table.rows, cos_sin)
        q, k, v = (t.unflatten(0, (B, S)).transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), modeling_mistral.eager_attention_forward
        )
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        return self.o_proj(out.reshape(B, S, -1)), weights


class MistralDecoderLayer(  # type: ignore[no-untyped-call]
    CheckpointedLayer, modeling_mistral.MistralDecoderLayer
):
    """A layer of the text model, in which the sum in the middle is normalized as it is formed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``hidden_states`` (B, S, hidden) to the same shape, as transformers' ``forward``."""
        norm = self.post_attention_layernorm
        ops = operations_of(self).for_call(hidden_states, norm.weight, module=self)
        if ops is None or args or type(norm) is not MistralRMSNorm or not is_unhooked(norm):
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = ops.add_rms_norm(
            attended, hidden_states, norm.weight, norm.variance_epsilon
        )
        out: Tensor = total + self.mlp(normed)
        return out


def nf4_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """Return the classes of bitsandbytes' layers, and what they are patched to."""
    # A model has such layers only if bitsandbytes was imported
    if "bitsandbytes" not in sys.modules:
        return {}
    from idefics2_engine.hf import nf4

    library: Any = sys.modules["bitsandbytes"]
    return {library.nn.Linear4bit: nf4.Linear4bit, library.nn.LinearNF4: nf4.Linear4bit}
