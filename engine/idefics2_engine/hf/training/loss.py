"""The loss of transformers' class without its logits, where a step of training wants it."""

import inspect
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.idefics2.modeling_idefics2 import Idefics2CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from idefics2_engine.hf import paged_cache
from idefics2_engine.hf.hooks import is_unhooked
from idefics2_engine.hf.operations import operations_of
from idefics2_kernels import Gradients
from idefics2_kernels.differentiable import linear_cross_entropy

_IGNORED_LABEL = -100
_FORWARD = inspect.signature(transformers.Idefics2ForConditionalGeneration.forward)
# Arguments with which transformers computes another loss
_OTHERS = ("shift_labels", "ignore_index")


class Idefics2ForConditionalGeneration(  # type: ignore[no-untyped-call]
    paged_cache.Idefics2ForConditionalGeneration
):
    """transformers' class of the same name, whose loss in training needs no logits.

    In training mode, with labels and where the operations have gradients, ``forward`` returns
    ``logits=None``, unless ``return_logits=True`` asks for them. Without any label the loss is 0,
    where transformers' is NaN.
    """

    @wraps(transformers.Idefics2ForConditionalGeneration.forward)
    def forward(  # type: ignore[override]
        self, *args: Any, return_logits: bool = False, **kwargs: Any
    ) -> Any:
        """Compute what transformers' ``forward`` does."""
        transformers_own: Any = super().forward
        bound = _FORWARD.bind(self, *args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        given.pop("self")
        wanted = not return_logits and given.get("labels") is not None
        # Logits of some tokens are another loss as well
        few = given.pop("logits_to_keep", 0)
        has_others = torch.is_tensor(few) or few != 0 or any(name in given for name in _OTHERS)
        gradients = None if has_others or not wanted else _gradients(self)
        if gradients is None:
            return transformers_own(*args, **kwargs)
        return self._forward_without_logits(gradients=gradients, **given)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def _forward_without_logits(
        self,
        gradients: Gradients,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Idefics2CausalLMOutputWithPast:
        out: Any = self.model(**kwargs)
        hidden: Tensor = out[0]
        # Each token predicts its successor, and the last of a row none
        targets = nn.functional.pad(labels, (0, 1), value=_IGNORED_LABEL)[:, 1:].to(hidden.device)
        loss = linear_cross_entropy(
            gradients,
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            num_items=num_items_in_batch,
        )
        return Idefics2CausalLMOutputWithPast(
            loss=loss,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=out.image_hidden_states,
        )


def _gradients(model: Any) -> Gradients | None:
    """Return the gradients for the head of ``model``, or ``None`` if its logits are needed."""
    head = model.lm_head
    if (
        not (model.training and torch.is_grad_enabled())
        # An adapter of the head, a hook and a loss of the caller's own need logits
        or type(head) is not nn.Linear
        or head.bias is not None
        or not is_unhooked(head)
        or model.loss_function is not ForCausalLMLoss
    ):
        return None
    return operations_of(model).gradients_for_call(head.weight)
