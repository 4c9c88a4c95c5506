"""Where the stages inside a layer are read, in our model and in transformers'."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.parity import inner_stages as inner
from idefics2_engine.parity import stages
from idefics2_engine.parity.recording.recorder import Tap


def our_inner_taps(model: Idefics2) -> dict[str, Tap]:
    """Return where the stages inside our layers are read.

    Queries, keys and values are one product, and norms are computed with the sum before them. So a
    norm is read where it is an input.
    """
    vision, text, perceiver = model.config.vision, model.config.text, model.config.perceiver
    kv_width = perceiver.num_kv_heads * perceiver.head_dim
    text_widths = [
        heads * text.head_dim for heads in (text.num_heads, text.num_kv_heads, text.num_kv_heads)
    ]
    taps: dict[str, Tap] = {}
    for name, layer in _named(stages.vision_layer, model.vision.layers):
        taps |= _branches(name, layer, layer.attention.out_proj)
        taps |= _split_product(name, layer.attention.qkv_proj, [vision.hidden_size] * 3)
    for name, layer in _named(stages.text_layer, model.text.layers):
        taps |= _branches(name, layer, layer.attention.o_proj)
        taps |= _split_product(name, layer.attention.qkv_proj, text_widths)
    for name, layer in _named(stages.perceiver_layer, model.connector.perceiver.layers):
        attention = layer.attention
        taps |= _branches(name, layer, attention.o_proj)
        taps |= {
            f"{name} {inner.PATCHES_NORM}": Tap(layer.context_norm, _whole),
            f"{name} {inner.QUERIES}": Tap(attention.q_proj, _whole),
        }
        for index, (of_patches, of_latents) in enumerate(
            ((inner.PATCHES_KEYS, inner.KEYS), (inner.PATCHES_VALUES, inner.VALUES))
        ):
            columns = slice(index * kv_width, (index + 1) * kv_width)
            taps[f"{name} {of_patches}"] = Tap(attention, _columns(columns, argument=1), True)
            taps[f"{name} {of_latents}"] = Tap(attention.kv_proj, _columns_of_latents(columns))
    return taps


def transformers_inner_taps(model: Any) -> dict[str, Tap]:
    """Return where the stages inside the layers of transformers' model are read."""
    vision, text = model.model.vision_model.encoder, model.model.text_model
    perceiver = model.model.connector.perceiver_resampler
    latents = perceiver.n_latents
    taps: dict[str, Tap] = {}
    for name, layer in _named(stages.vision_layer, vision.layers):
        taps |= _their_branches(name, layer, layer.layer_norm1, layer.self_attn.out_proj)
        taps[f"{name} {inner.MLP_NORM}"] = Tap(layer.layer_norm2, _whole)
    for name, layer in _named(stages.text_layer, text.layers):
        taps |= _their_branches(name, layer, layer.input_layernorm, layer.self_attn.o_proj)
        taps[f"{name} {inner.MLP_NORM}"] = Tap(layer.post_attention_layernorm, _whole)
    for name, layer in _named(stages.perceiver_layer, perceiver.layers):
        taps |= _their_branches(name, layer, layer.input_latents_norm, layer.self_attn.o_proj)
        taps |= {
            f"{name} {inner.MLP_NORM}": Tap(layer.post_attention_layernorm, _whole),
            f"{name} {inner.PATCHES_NORM}": Tap(layer.input_context_norm, _whole),
        }
        # The latents follow the patches, padded, in one product
        for of_patches, of_latents, module in (
            (inner.PATCHES_KEYS, inner.KEYS, layer.self_attn.k_proj),
            (inner.PATCHES_VALUES, inner.VALUES, layer.self_attn.v_proj),
        ):
            taps[f"{name} {of_patches}"] = Tap(module, lambda out: out[:, :-latents])
            taps[f"{name} {of_latents}"] = Tap(module, lambda out: out[:, -latents:])
    return taps


def _named(name: Callable[[int], str], layers: Iterable[nn.Module]) -> Iterable[tuple[str, Any]]:
    return ((name(index), layer) for index, layer in enumerate(layers))


def _branches(name: str, layer: Any, projection: nn.Module) -> dict[str, Tap]:
    """Return the taps that our layers of all parts share."""
    return {
        f"{name} {inner.NORM}": Tap(layer.attention, _first, before=True),
        f"{name} {inner.ATTENTION}": Tap(projection, _first, before=True),
        f"{name} {inner.PROJECTION}": Tap(projection, _whole),
        f"{name} {inner.MLP_NORM}": Tap(layer.mlp, _first, before=True),
        f"{name} {inner.MLP}": Tap(layer.mlp, _whole),
    }


def _their_branches(
    name: str, layer: Any, norm: nn.Module, projection: nn.Module
) -> dict[str, Tap]:
    """Return the taps that transformers' layers of all parts share."""
    return {
        f"{name} {inner.NORM}": Tap(norm, _whole),
        f"{name} {inner.QUERIES}": Tap(layer.self_attn.q_proj, _whole),
        f"{name} {inner.KEYS}": Tap(layer.self_attn.k_proj, _whole),
        f"{name} {inner.VALUES}": Tap(layer.self_attn.v_proj, _whole),
        f"{name} {inner.ATTENTION}": Tap(projection, _first, before=True),
        f"{name} {inner.PROJECTION}": Tap(projection, _whole),
        f"{name} {inner.MLP}": Tap(layer.mlp, _whole),
    }


def _split_product(name: str, product: nn.Module, widths: list[int]) -> dict[str, Tap]:
    """Return the taps of queries, keys and values, which are side by side in ``product``."""
    taps, start = {}, 0
    for part, width in zip((inner.QUERIES, inner.KEYS, inner.VALUES), widths, strict=True):
        taps[f"{name} {part}"] = Tap(product, _columns(slice(start, start + width)))
        start += width
    return taps


def _whole(out: Tensor) -> Tensor:
    return out


def _first(args: tuple[Tensor, ...]) -> Tensor:
    return args[0]


def _columns(columns: slice, argument: int | None = None) -> Callable[[Any], Tensor]:
    """Return what takes ``columns`` of an output, or of an argument."""

    def take(value: Any) -> Tensor:
        found: Tensor = value if argument is None else value[argument]
        return found[..., columns]

    return take


def _columns_of_latents(columns: slice) -> Callable[[Tensor], Tensor | None]:
    """Return what takes ``columns`` of (N, L, width); patches are (P, width)."""
    return lambda out: out[..., columns] if out.ndim == 3 else None
