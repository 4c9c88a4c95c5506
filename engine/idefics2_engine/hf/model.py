"""transformers' Idefics2 on this package's operations."""

from typing import Any

from idefics2_engine.hf import paged_cache
from idefics2_engine.hf.accelerate import patch_blocks
from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.operations import Operations

_ALIASES = (None, "flash_attention_2")


class Idefics2ForConditionalGeneration(  # type: ignore[no-untyped-call]
    paged_cache.Idefics2ForConditionalGeneration
):
    """transformers' class of the same name, computed by this package's operations.

    Parameters, their names, config, inputs, outputs and files are transformers'. These differ:

    - ``attn_implementation`` is ``"idefics2"`` unless given. ``"flash_attention_2"`` is another name
      for it, so that code for flash-attn runs without flash-attn. ``"sdpa"`` and ``"eager"`` are
      transformers'.
    - Norms, MLPs, rotary positions and NF4 products call ``Ops``: ``TRITON`` on CUDA and
      ``REFERENCE`` elsewhere. ``accelerate_model(model, ops)`` sets others.
    - ``generate`` makes a ``PagedCache`` unless another cache is asked for.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        parts = {"": config} | {name: getattr(config, name) for name in config.sub_configs}
        config._attn_implementation = _own_name(
            {name: part._attn_implementation for name, part in parts.items()}
        )
        super().__init__(config, *inputs, **kwargs)
        patch_blocks(self, Operations())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers' ``from_pretrained``, with the same arguments."""
        kwargs["attn_implementation"] = _own_name(kwargs.get("attn_implementation"))
        loaded = super().from_pretrained(*args, **kwargs)
        # Quantized layers replace others after __init__
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        patch_blocks(model, Operations())
        return loaded

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Switch the attention as transformers does, with the names of this class."""
        super().set_attn_implementation(_own_name(attn_implementation), *args, **kwargs)


def _own_name(requested: Any) -> Any:
    """Return ``requested``, or the name of this package's attention if it is an alias of it."""
    if isinstance(requested, dict):
        return {part: _own_name(name) for part, name in requested.items()}
    return NAME if requested in _ALIASES else requested
