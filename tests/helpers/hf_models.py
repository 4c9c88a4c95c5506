"""transformers' tiny model, the same on this package's operations, and counted calls of these."""

from collections import Counter
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.hf import Idefics2ForConditionalGeneration, accelerate_model
from idefics2_kernels import REFERENCE, REFERENCE_GRADIENTS, Gradients, Ops
from oracle import IMAGE_TOKEN, TinyCase, build_oracle, oracle_inputs, padded_ids

# Some releases hide every image processor of theirs if torchvision is missing
needs_processor = pytest.mark.skipif(
    find_spec("torchvision") is None
    and transformers.Idefics2ImageProcessorPil is not Idefics2ImageProcessorPil,
    reason=f"transformers {transformers.__version__} loads no processor without torchvision",
)

# Pictures of several sizes, a padded picture, a row of three tiles, and a window that is shorter
# than every prompt
MIXED = TinyCase(
    "mixed-sizes",
    (((56, 70),), ((112, 30), (14, 14)), ((70, 56),)),
    (9, 17, 11),
    text={"sliding_window": 7},
)

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
# These are computed in transformers' loop. An image token of the answer would want an image
LOOPED: dict[str, Any] = GREEDY | {"suppress_tokens": [IMAGE_TOKEN]}
"""Arguments of ``generate`` that leave nothing to chance."""


def engine_of(model: Any) -> Any:
    """Return the engine that ``model`` has made, or ``None``."""
    return model.engine.engine


def batch(case: TinyCase, side: str = "left") -> dict[str, Tensor]:
    """Return the batch of ``case`` padded on one side, as arguments of the model."""
    input_ids, attention_mask = padded_ids(case, side)
    return oracle_inputs(case) | {"input_ids": input_ids, "attention_mask": attention_mask}


def build_peer(case: TinyCase, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' random model of ``case`` on ``sdpa``."""
    peer = build_oracle(case, dtype).eval()
    peer.set_attn_implementation("sdpa")
    # It generates as many tokens as asked for
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer


def build_own(peer: Any, case: TinyCase, ops: Ops | None = REFERENCE) -> Any:
    """Return this package's class with the weights of ``peer``."""
    own = Idefics2ForConditionalGeneration(case.config()).to(peer.dtype)
    own.load_state_dict(peer.state_dict())
    own.generation_config = peer.generation_config
    return accelerate_model(own.eval(), ops)


def kept_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of all tokens but padding, without gradients."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()]


def worst_row(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of a row, relative to its largest value."""
    difference = (got.double() - wanted.double()).abs().amax(-1)
    return float((difference / wanted.double().abs().amax(-1)).max())


def counted(ops: Ops, calls: Counter[str]) -> Ops:
    """Return ``ops``, of which each adds its calls to ``calls`` and has no gradient.

    Like those of ``TRITON``, they must not be called where a gradient is needed.
    """

    def count(name: str, operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            assert not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
            return operation(*args, **kwargs)

        return call

    return replace(ops, **{f.name: count(f.name, getattr(ops, f.name)) for f in fields(ops)})


def counted_gradients(calls: Counter[str]) -> Gradients:
    """Return the reference gradients, of which each adds its calls to ``calls``."""

    def count(name: str, gradient: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[f"{name} backward"] += 1
            return gradient(*args, **kwargs)

        return call

    table = REFERENCE_GRADIENTS
    return replace(table, **{f.name: count(f.name, getattr(table, f.name)) for f in fields(table)})


def labeled(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return ``inputs`` with labels: all tokens but padding and image tokens."""
    ids = inputs["input_ids"]
    ignored = (inputs["attention_mask"] == 0) | (ids == IMAGE_TOKEN)
    return inputs | {"labels": ids.masked_fill(ignored, -100)}
