"""What was asked of ``generate`` that the engine has not, in words."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.hooks import is_unhooked


class NotOnEngineError(ValueError):
    """A call of ``generate`` that transformers' loop must serve; the text says why."""


# The arguments of the model that the engine takes, and those that transformers adds
_INPUTS = {
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "pixel_attention_mask",
    "pixel_values",
    "position_ids",
    "tokenizer",
    "use_cache",
}
CALLERS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "custom_generate",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "past_key_values",
    "inputs_embeds",
    "position_ids",
    "synced_gpus",
)
"""The caller's arguments that keep their meaning in transformers' loop alone."""
OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
"""What a config can ask for besides tokens."""


def check_caller(arguments: Mapping[str, Any], own_config: Any) -> None:
    """Check the ``arguments`` with which ``generate`` was called, and the model's ``own_config``.

    Raises:
        NotOnEngineError: One of them is for transformers' loop.
    """
    for name in CALLERS:
        value = arguments.get(name)
        is_given = bool(value) if isinstance(value, bool | list) else value is not None
        if is_given:
            raise NotOnEngineError(f"{name} needs transformers' loop")
    for source in (arguments, vars(arguments.get("generation_config") or own_config)):
        if source.get("num_beams") is not None:
            if source["num_beams"] != 1:
                raise NotOnEngineError("num_beams needs transformers' loop")
            break


def check_config(generation_config: Any, synced_gpus: bool) -> None:
    """Check the config that transformers prepared from all sources.

    Raises:
        NotOnEngineError: It asks for more than tokens, or for a cache of transformers.
    """
    for name in OUTPUTS:
        if getattr(generation_config, name, None):
            raise NotOnEngineError(f"{name} needs transformers' loop")
    for name in ("cache_implementation", "prefill_chunk_size", "watermarking_config"):
        if getattr(generation_config, name, None) is not None:
            raise NotOnEngineError(f"{name} needs transformers' loop")
    if generation_config.use_cache is False:
        raise NotOnEngineError("use_cache=False needs transformers' loop")
    if synced_gpus:
        raise NotOnEngineError("synced_gpus needs transformers' loop")


def check_inputs(model_kwargs: Mapping[str, Any]) -> None:
    """Check the arguments that transformers would pass to the model.

    Raises:
        NotOnEngineError: The engine knows one of them not.
    """
    unknown = [k for k, v in model_kwargs.items() if k not in _INPUTS and v is not None]
    if unknown:
        raise NotOnEngineError(f"{unknown[0]} needs transformers' loop")


def check_model(model: Any) -> None:
    """Check what ``model`` does besides multiplying its weights.

    Raises:
        NotOnEngineError: Another attention, autocast, dropout, hooks or adapters.
    """
    config = model.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    for part in parts:
        if part._attn_implementation != NAME:
            raise NotOnEngineError(
                f"attn_implementation={part._attn_implementation!r} needs transformers' loop"
            )
        if model.training and getattr(part, "attention_dropout", 0.0):
            raise NotOnEngineError("a model in training has dropout")
    if torch.is_autocast_enabled(model.device.type):
        raise NotOnEngineError("torch.autocast needs transformers' loop")
    for name, module in model.named_modules():
        if not is_unhooked(module):
            raise NotOnEngineError(f"a hook of {name or 'the model'} would not be called")
        if _has_active_adapter(module):
            raise NotOnEngineError(f"an adapter of {name} is active and not merged")


def _has_active_adapter(module: Any) -> bool:
    # A model has such layers only if PEFT was imported
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return False
    merged = set(getattr(module, "merged_adapters", ()))
    return not module.disable_adapters and not set(module.active_adapters) <= merged
