"""The path of transformers, unpatched, with hooks on its model."""

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import torch_device, torch_dtype
from idefics2_engine.errors import ConfigError
from idefics2_engine.images.tiling import QUARTERS
from idefics2_engine.parity import stages
from idefics2_engine.parity.inputs import Case
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.case_recording import (
    CaseRecording,
    id_matrix,
    pixel_matrix,
    token_parts,
)
from idefics2_engine.parity.recording.inner_taps import transformers_inner_taps
from idefics2_engine.parity.recording.recorder import Recorder, Tap


def transformers_taps(model: Any) -> dict[str, Tap]:
    """Return where each stage of transformers' ``Idefics2ForConditionalGeneration`` is read."""

    def hidden(output: Any) -> Tensor:
        found: Tensor = getattr(output, "last_hidden_state", output)
        return found[0] if isinstance(found, tuple) else found

    inner = model.model
    vision, perceiver, text = (
        inner.vision_model,
        inner.connector.perceiver_resampler,
        inner.text_model,
    )
    taps = {
        stages.PATCH_EMBEDDING: Tap(vision.embeddings, hidden),
        stages.VISION_NORM: Tap(vision.post_layernorm, hidden),
        stages.PROJECTION: Tap(inner.connector.modality_projection, hidden),
        stages.PERCEIVER_NORM: Tap(perceiver.norm, hidden),
        stages.TEXT_EMBEDDING: Tap(text.layers[0], lambda args: args[0], before=True),
        stages.TEXT_NORM: Tap(text.norm, hidden),
    }
    for name, layers in (
        (stages.vision_layer, vision.encoder.layers),
        (stages.perceiver_layer, perceiver.layers),
        (stages.text_layer, text.layers),
    ):
        taps |= {name(i): Tap(layer, hidden) for i, layer in enumerate(layers)}
    return taps | transformers_inner_taps(model)


def tile_rows(padded: Tensor, grids: Sequence[tuple[int, int]], columns: int) -> list[Tensor]:
    """Return the patches of each tile from rows (N, P, hidden) that padding made equally wide.

    Args:
        padded: A stage of all tiles.
        grids: Rows and columns of patches of each tile.
        columns: Columns of patches of the widest tile.
    """
    parts = []
    for rows, (height, width) in zip(padded, grids, strict=True):
        at = torch.arange(height * width)
        parts.append(rows[at // width * columns + at % width])
    return parts


def check_installed() -> None:
    """Raise ``ConfigError`` if transformers is missing."""
    if find_spec("transformers") is None:
        raise ConfigError(
            "the path transformers must have its package, got none: pip install transformers"
        )


def load_transformers(folder: pathlib.Path, path: Path, device_name: str) -> Any:
    """Load transformers' model of the checkpoint in ``folder``.

    Raises:
        ConfigError: transformers is missing.
    """
    check_installed()
    import transformers

    # transformers is only partly typed
    library: Any = transformers
    device = torch_device(device_name)
    log = library.utils.logging
    had_bar = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        model = library.Idefics2ForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch_dtype(path.dtype or "auto", device),
            attn_implementation=path.implementation or "sdpa",
        )
    finally:
        if had_bar:
            log.enable_progress_bar()
    return model.to(device).eval()


def load_processor(folder: pathlib.Path) -> Any:
    """Load transformers' processor, which prepares images with Pillow as ours does."""
    import transformers

    library: Any = transformers
    processor = library.AutoProcessor.from_pretrained(folder)
    processor.image_processor = library.Idefics2ImageProcessorPil.from_pretrained(folder)
    return processor


def record_transformers(
    folder: pathlib.Path,
    path: Path,
    cases: Sequence[Case],
    order: Sequence[str],
    *,
    device: str = "auto",
    max_tokens: int = 16,
) -> Iterator[CaseRecording]:
    """Answer each case alone with transformers' ``generate``, and yield the stages in ``order``.

    Raises:
        ConfigError: transformers is missing.
    """
    model = load_transformers(folder, path, device)
    processor = load_processor(folder)
    splits, size = processor.image_processor.do_image_splitting, processor.image_processor.size
    patch = model.config.vision_config.patch_size
    recorder = Recorder.of_stages(transformers_taps(model), order)
    for case in cases:
        split = splits if case.split is None else case.split
        processor.image_processor.do_image_splitting = split
        processor.image_processor.size = replace(
            size, longest_edge=case.longest_edge or size.longest_edge
        )
        images = [_read_image(source) for source in case.images]
        inputs = processor(
            text=[_prompt_text(processor, case)],
            images=[images] if images else None,
            return_tensors="pt",
        )
        with recorder.recording() as found, torch.inference_mode():
            output = model.generate(
                **inputs.to(model.device), do_sample=False, max_new_tokens=max_tokens
            )[0].tolist()
        prompt_ids = inputs["input_ids"][0].tolist()
        answer_ids = output[len(prompt_ids) :]
        tiles = _tiles(inputs)
        grids = [(tile.shape[0] // patch, tile.shape[1] // patch) for tile in tiles]
        tokenizer = processor.tokenizer
        recording = CaseRecording(
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            text=tokenizer.decode(answer_ids, skip_special_tokens=True),
            token_texts=[tokenizer.decode([i]) for i in output],
            grids=grids,
            tiles_per_image=QUARTERS + 1 if split else 1,
            question=case.asked,
        )
        recording.stages = {
            stages.DECODE: [pixel_matrix(np.asarray(image)) for image in images],
            stages.TILES: [pixel_matrix(tile) for tile in tiles],
            stages.TOKEN_IDS: [id_matrix(prompt_ids)],
            stages.TOKENS: [id_matrix(answer_ids)],
        }
        columns = inputs["pixel_values"].shape[-1] // patch if tiles else 0
        recording.stages |= _model_stages(model, found, recording, columns)
        yield recording


def _model_stages(
    model: Any, found: dict[str, list[Tensor]], recording: CaseRecording, columns: int
) -> dict[str, list[Tensor]]:
    """Return the parts of each stage that hooks ``found``, and the logits if there are any."""
    lengths = len(recording.prompt_ids), len(recording.answer_ids)
    parts: dict[str, list[Tensor]] = {}
    for stage, tensors in found.items():
        match stages.unit(stage):
            case "token":
                rows = torch.cat([tensor.flatten(0, 1) for tensor in tensors])
                parts[stage] = token_parts(rows, *lengths)
            case "latent":
                hidden = tensors[0].shape[-1]
                parts[stage] = list(tensors[0].reshape(len(recording.grids), -1, hidden))
            case _:
                parts[stage] = tile_rows(tensors[0], recording.grids, columns)
    if stages.TEXT_NORM not in parts:
        return parts
    with torch.inference_mode():
        hidden_states = torch.cat(parts[stages.TEXT_NORM]).to(model.device)
        logits = model.lm_head(hidden_states).cpu()
    parts[stages.LOGITS] = token_parts(logits, *lengths)
    return parts


def _read_image(source: Any) -> Any:
    """Read an image as transformers does, upright and in RGB."""
    from io import BytesIO

    from PIL import Image
    from transformers.image_utils import load_image

    if isinstance(source, bytes):
        source = Image.open(BytesIO(source))
    return load_image(source if isinstance(source, Image.Image) else str(source))


def _prompt_text(processor: Any, case: Case) -> str:
    if case.turns is None:
        return case.text or ""
    text: str = processor.apply_chat_template(list(case.turns), add_generation_prompt=True)
    return text


def _tiles(inputs: Any) -> list[Any]:
    """Return the normalized pixels (H, W, 3) of each tile, without padding."""
    if "pixel_values" not in inputs:
        return []
    pixels, mask = inputs["pixel_values"][0], inputs["pixel_attention_mask"][0].bool()
    tiles = []
    for tile, own in zip(pixels, mask, strict=True):
        height, width = int(own.any(1).sum()), int(own.any(0).sum())
        tiles.append(tile[:, :height, :width].permute(1, 2, 0).cpu().numpy())
    return tiles
