"""Patching a loaded Idefics2 of transformers, this instance alone."""

import copy
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.mistral import modeling_mistral

from idefics2_engine.hf import blocks, decode_graph, vision_blocks
from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.operations import Operations, set_operations
from idefics2_engine.hf.training import loss
from idefics2_kernels import Gradients, Ops

Model = TypeVar("Model", bound=nn.Module)

_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_mistral.MistralRMSNorm: blocks.MistralRMSNorm,
    modeling_mistral.MistralMLP: blocks.MistralMLP,
    modeling_mistral.MistralRotaryEmbedding: blocks.MistralRotaryEmbedding,
    modeling_mistral.MistralAttention: blocks.MistralAttention,
    modeling_idefics2.Idefics2RMSNorm: blocks.Idefics2RMSNorm,
    modeling_idefics2.Idefics2MLP: blocks.Idefics2MLP,
    modeling_idefics2.Idefics2VisionMLP: vision_blocks.Idefics2VisionMLP,
    modeling_idefics2.Idefics2VisionEmbeddings: vision_blocks.Idefics2VisionEmbeddings,
    modeling_idefics2.Idefics2Encoder: vision_blocks.Idefics2Encoder,
    modeling_idefics2.Idefics2PerceiverLayer: vision_blocks.Idefics2PerceiverLayer,
    modeling_idefics2.Idefics2Connector: vision_blocks.Idefics2Connector,
    nn.LayerNorm: vision_blocks.LayerNorm,
    modeling_mistral.MistralDecoderLayer: blocks.MistralDecoderLayer,
    modeling_mistral.MistralModel: decode_graph.MistralModel,
    modeling_idefics2.Idefics2VisionTransformer: vision_blocks.Idefics2VisionTransformer,
    modeling_idefics2.Idefics2EncoderLayer: vision_blocks.Idefics2EncoderLayer,
    modeling_idefics2.Idefics2ForConditionalGeneration: loss.Idefics2ForConditionalGeneration,
}


def accelerate_model(
    model: Model, ops: Ops | None = None, gradients: Gradients | None = None
) -> Model:
    """Let an Idefics2 of transformers compute with this package's operations.

    Its ``attn_implementation`` becomes ``"idefics2"``, and its norms, MLPs, rotary positions and NF4
    layers get ``forward`` of this package. ``generate`` makes a ``PagedCache`` unless another cache
    is asked for. Parameters, their names and all other models of the process are unchanged. Calling
    it again changes nothing but ``ops`` and ``gradients``.

    Args:
        model: transformers' ``Idefics2ForConditionalGeneration`` or ``Idefics2Model``, or a module
            around one, such as PEFT's.
        ops: The operations. If ``None``, ``TRITON`` on CUDA and ``REFERENCE`` elsewhere, whenever
            the model is called.
        gradients: The gradients of ``ops``. If ``None``, those of the default operations; with
            ``ops`` transformers' own operations then run where gradients are needed.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` contains no Idefics2.
    """
    classes = (modeling_idefics2.Idefics2ForConditionalGeneration, modeling_idefics2.Idefics2Model)
    inner: Any = next((module for module in model.modules() if isinstance(module, classes)), None)
    if inner is None:
        raise TypeError(
            "model must be or contain transformers' Idefics2ForConditionalGeneration or "
            f"Idefics2Model, got {type(model).__name__}"
        )
    config = inner.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    if any(part._attn_implementation != NAME for part in parts):
        _copy_configs(model, config)
        inner.set_attn_implementation(NAME)
    patch_blocks(model, Operations(ops, gradients))
    return model


def patch_blocks(model: nn.Module, operations: Operations) -> None:
    """Give the modules of ``model`` this package's ``forward`` and ``operations``."""
    replacements = _BLOCKS | blocks.nf4_layers()
    for module in model.modules():
        set_operations(module, operations)
        replacement = replacements.get(type(module))
        if replacement is None or not _is_computed_here(module):
            continue
        module.__class__ = replacement
        # accelerate calls the ``forward`` that it found
        if "_old_forward" in module.__dict__:
            module.__dict__["_old_forward"] = MethodType(replacement.forward, module)


def _is_computed_here(module: Any) -> bool:
    """Return whether the operations compute what ``module`` computes."""
    if isinstance(module, nn.LayerNorm):
        # Without weights, or over more than one axis, it is not the vision tower's
        return module.bias is not None and len(module.normalized_shape) == 1
    if isinstance(module, modeling_idefics2.Idefics2VisionMLP):
        return isinstance(module.activation_fn, type(ACT2FN["gelu_pytorch_tanh"]))
    if isinstance(module, modeling_idefics2.Idefics2MLP | modeling_mistral.MistralMLP):
        return isinstance(module.act_fn, type(ACT2FN["silu"]))
    return True


def _copy_configs(model: nn.Module, config: Any) -> None:
    """Give ``model`` a config of its own, which another model may have had as well."""
    copied: dict[int, Any] = {}
    copy.deepcopy(config, copied)
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in copied:
            module.__dict__["config"] = copied[id(held)]
