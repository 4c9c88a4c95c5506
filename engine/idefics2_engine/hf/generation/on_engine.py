"""One call of ``generate``: whether the engine serves it, and its result in transformers' form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.hf.generation.model_engine import ModelEngine
from idefics2_engine.hf.generation.obstacles import (
    NotOnEngineError,
    check_config,
    check_inputs,
)
from idefics2_engine.hf.generation.requests import make_requests
from idefics2_engine.hf.generation.sampling import read_sampling
from idefics2_engine.hf.operations import operations_of
from idefics2_engine.hf.shared_weights import NotShareableError, config_of
from idefics2_engine.scheduling.sequence import Request


def generate_on_engine(
    model: Any,
    caller: Mapping[str, Any],
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """Continue ``input_ids`` (B, S) on the engine of ``model``, to (B, longest).

    Args:
        model: This package's ``Idefics2ForConditionalGeneration``.
        caller: The arguments of ``generate`` by name, which ``check_caller`` has passed. So has
            ``check_model`` the model.
        input_ids: Padded prompts, each as often as it has answers.
        logits_processor: transformers' list.
        stopping_criteria: transformers' list.
        generation_config: The config that transformers prepared.
        synced_gpus: Whether other processes wait for this one.
        streamer: Gets each token as it comes.
        **model_kwargs: Arguments of the model's ``forward``.

    Raises:
        NotOnEngineError: The engine has not what was asked for. Nothing was computed.
    """
    check_config(generation_config, synced_gpus)
    check_inputs(model_kwargs)
    if streamer is not None and len(input_ids) > 1:
        raise NotOnEngineError("a streamer of several rows needs transformers' loop")
    try:
        config = config_of(model)
    except NotShareableError as error:
        raise NotOnEngineError(str(error)) from error
    sampling = read_sampling(
        generation_config,
        logits_processor,
        stopping_criteria,
        input_ids.shape[1],
        config.text.vocab_size,
    )
    # transformers has repeated each row for its answers
    answers = sampling.params.n
    rows = {
        name: None if model_kwargs.get(name) is None else model_kwargs[name][::answers]
        for name in ("attention_mask", "pixel_values", "pixel_attention_mask")
    }
    requests = make_requests(model, config, sampling, input_ids[::answers], **rows)
    engine: ModelEngine = model.engine
    try:
        packed = engine.share_weights(model, config, operations_of(model).on(model.device))
    except NotShareableError as error:
        raise NotOnEngineError(str(error)) from error
    follow = None if streamer is None else _follow(requests[0], streamer)
    tokenizer = caller.get("tokenizer") if sampling.params.stop else None
    drawn = engine.answer(packed, requests, tokenizer, follow)
    if streamer is not None:
        streamer.end()
    return _padded(input_ids, drawn, generation_config._pad_token_tensor)


def _follow(request: Request, streamer: Any) -> Callable[[], None]:
    """Return what gives the new tokens of ``request`` to ``streamer`` after each step."""
    given = 0

    def follow() -> None:
        nonlocal given
        for sequence in request.sequences:
            new = sequence.known_tokens()[len(request.prompt_token_ids) :]
            for token in new[given:]:
                streamer.put(torch.tensor([token]))
            given = len(new)

    return follow


def _padded(input_ids: Tensor, drawn: list[list[int]], pad: Tensor | None) -> Tensor:
    """Return each row of ``input_ids`` with its new tokens, padded on the right."""
    width = max(map(len, drawn))
    # Without a token of padding, all answers have one length
    fill = 0 if pad is None else int(pad)
    new = torch.tensor([row + [fill] * (width - len(row)) for row in drawn], dtype=input_ids.dtype)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)
