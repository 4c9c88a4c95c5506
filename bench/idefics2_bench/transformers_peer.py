"""transformers' Idefics2 on the engine's weights, for benchmarks of both in one process.

Its parameters are views of the engine's fused ones, so it needs no memory for weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.images.tiling import ImageConfig, Tile, normalize
from idefics2_engine.json_file import read_json
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.prompts.processor import ProcessedPrompt


def is_installed() -> bool:
    """Return whether transformers is installed."""
    return find_spec("transformers") is not None


def transformers_model(model: Idefics2, folder: Path) -> Any:
    """Build transformers' model of ``folder``'s config on the parameters of ``model``.

    Raises:
        RuntimeError: transformers' model has tensors that ``model`` lacks.
    """
    import transformers

    from idefics2_engine.hf.shared_weights import model_on

    # transformers is only partly typed
    library: Any = transformers
    kind = library.Idefics2ForConditionalGeneration
    return model_on(model, kind, transformers_config(model, folder), attn_implementation="sdpa")


def transformers_config(model: Idefics2, folder: Path) -> Any:
    """Return transformers' config of ``folder``, with the perceiver's epsilon of ``model``."""
    import transformers

    library: Any = transformers
    values = read_json(folder / "config.json")
    perceiver = values.get("perceiver_config") or {}
    # transformers' default differs from the value that the checkpoint was trained with
    eps = model.config.perceiver.rms_norm_eps
    return library.Idefics2Config(
        **{**values, "perceiver_config": {**perceiver, "rms_norm_eps": eps}}
    )


def padded_images(
    rows: Sequence[Sequence[Tile]], config: ImageConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return ``rows`` padded as by transformers: pixels (B, N, 3, H, W) and mask (B, N, H, W)."""
    sizes = [tile.pixels.shape[:2] for row in rows for tile in row]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    shape = len(rows), max(map(len, rows))
    pixels = np.zeros((*shape, 3, height, width), dtype=np.float32)
    mask = np.zeros((*shape, height, width), dtype=np.int64)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            h, w, _ = tile.pixels.shape
            pixels[i, j, :, :h, :w] = normalize(tile, config)
            mask[i, j, :h, :w] = 1
    values = torch.from_numpy(pixels).to(device).to(dtype)
    return {"pixel_values": values, "pixel_attention_mask": torch.from_numpy(mask).to(device)}


def left_padded(
    prompts: Sequence[ProcessedPrompt], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (B, T), shorter prompts padded on the left."""
    shape = len(prompts), max(len(prompt.token_ids) for prompt in prompts)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, shape[1] - len(prompt.token_ids) :] = prompt.token_ids
        mask[row, shape[1] - len(prompt.token_ids) :] = 1
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }


def generation_inputs(
    peer: Any, prompts: Sequence[ProcessedPrompt], config: ImageConfig, pad_id: int
) -> dict[str, Tensor]:
    """Return the inputs of ``prompts`` for ``peer``, shorter prompts padded on the left."""
    inputs = left_padded(prompts, pad_id, peer.device)
    if any(prompt.tiles for prompt in prompts):
        tiles = [prompt.tiles for prompt in prompts]
        inputs |= padded_images(tiles, config, peer.device, peer.dtype)
    return inputs


@contextmanager
def decoding_without_cudnn() -> Iterator[Any]:
    """Yield the ``logits_processor`` of one ``generate`` whose decode steps run without cuDNN."""
    import transformers

    library: Any = transformers

    def leave_out_cudnn(_input_ids: Tensor, scores: Tensor) -> Tensor:
        # The prompts have been computed when the first scores are processed
        torch.backends.cuda.enable_cudnn_sdp(False)
        return scores

    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield library.LogitsProcessorList([leave_out_cudnn])
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def generate(peer: Any, inputs: dict[str, Tensor], pad_id: int, max_new_tokens: int) -> Tensor:
    """Continue ``inputs`` greedily, also after end tokens; return ids (B, ``max_new_tokens``).

    Decode steps run without cuDNN's attention, as in ``bench latency``.

    Raises:
        RuntimeError: transformers generated another number of tokens.
    """
    import transformers

    library: Any = transformers
    greedy = library.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None, pad_token_id=pad_id
    )
    # The model's own config would add an end token to ``greedy``
    peer.generation_config = greedy

    with decoding_without_cudnn() as processors, torch.inference_mode():
        tokens: Tensor = peer.generate(
            **inputs, generation_config=greedy, logits_processor=processors
        )
    new = tokens[:, inputs["input_ids"].shape[1] :]
    if new.shape[1] != max_new_tokens:
        raise RuntimeError(f"transformers generated {new.shape[1]} tokens, not {max_new_tokens}")
    return new
