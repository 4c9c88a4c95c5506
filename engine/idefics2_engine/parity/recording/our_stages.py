"""The engine's own path: its steps, with hooks on the model."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.device import torch_device, torch_dtype
from idefics2_engine.images.loader import load_image
from idefics2_engine.images.tiling import Tile, normalize
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.parity import stages
from idefics2_engine.parity.inputs import Case, Processors
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.case_recording import (
    CaseRecording,
    id_matrix,
    pixel_matrix,
    token_parts,
)
from idefics2_engine.parity.recording.inner_taps import our_inner_taps
from idefics2_engine.parity.recording.recorder import Recorder, Tap
from idefics2_engine.prompts.processor import ProcessedPrompt, Processor
from idefics2_engine.request_builder import RequestBuilder
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from idefics2_kernels import Ops


def our_taps(model: Idefics2) -> dict[str, Tap]:
    """Return where each stage of our model is read.

    A layer returns a branch and the residual that the next norm adds it to. The stage is the sum.
    The stages inside the layers are among them.
    """

    def total(pair: tuple[Tensor, ...]) -> Tensor:
        return pair[0] + pair[1]

    vision, text, perceiver = model.vision, model.text, model.connector.perceiver
    taps = {
        stages.PATCH_EMBEDDING: Tap(vision.layers[0], total, before=True),
        stages.VISION_NORM: Tap(vision, lambda out: out),
        stages.PROJECTION: Tap(model.connector.projection, lambda out: out),
        stages.PERCEIVER_NORM: Tap(perceiver, lambda out: out),
        stages.TEXT_EMBEDDING: Tap(text.layers[0], lambda args: args[1], before=True),
        stages.TEXT_NORM: Tap(text, lambda out: out),
    }
    for name, layers in (
        (stages.vision_layer, vision.layers),
        (stages.perceiver_layer, perceiver.layers),
        (stages.text_layer, text.layers),
    ):
        taps |= {name(i): Tap(layer, total) for i, layer in enumerate(layers)}
    return taps | our_inner_taps(model)


def load_model(folder: pathlib.Path, path: Path, device_name: str, ops: Ops) -> Idefics2:
    """Load the model of a path, which calls ``ops``."""
    device = torch_device(device_name)
    return load_checkpoint(
        folder,
        ops,
        device,
        torch_dtype(path.dtype or "auto", device),
        quantization=Quantization.from_arguments("nf4" if path.nf4 else None, None, True),
    )


def prompt_recording(
    case: Case, processor: Processor, prompt: ProcessedPrompt, answer_ids: list[int], text: str
) -> CaseRecording:
    """Return a recording of the stages that are computed before and after the model."""
    tokenizer, config = processor.tokenizer, processor.image_config
    recording = CaseRecording(
        prompt_ids=prompt.token_ids,
        answer_ids=answer_ids,
        text=text,
        token_texts=[
            tokenizer.decode([i], skip_special_tokens=False) for i in prompt.token_ids + answer_ids
        ],
        grids=[tile.grid for tile in prompt.tiles],
        tiles_per_image=config.tiles_per_image,
        question=case.asked,
    )
    images = [load_image(source, processor.media) for source in case.images]
    recording.stages = {
        stages.DECODE: [pixel_matrix(image) for image in map(_array, images)],
        stages.TILES: [
            pixel_matrix(normalize(tile, config).transpose(1, 2, 0)) for tile in prompt.tiles
        ],
        stages.TOKEN_IDS: [id_matrix(prompt.token_ids)],
        stages.TOKENS: [id_matrix(answer_ids)],
    }
    return recording


def record_ours(
    folder: pathlib.Path,
    path: Path,
    cases: Sequence[Case],
    order: Sequence[str],
    ops: Ops,
    *,
    device: str = "auto",
    max_tokens: int = 16,
) -> Iterator[CaseRecording]:
    """Answer each case alone in the engine, and yield the stages in ``order``.

    Raises:
        Idefics2Error: The model, a prompt or an image is invalid, or a request failed.
    """
    processors = Processors(folder)
    prompts = [case.process(processors.of(case)) for case in cases]
    processor = processors.of(cases[0])
    model = load_model(folder, path, device, ops)
    generation = GenerationConfig.of_checkpoint(folder, processor.tokenizer)
    positions = model.config.text.max_positions
    longest = max(len(prompt.token_ids) for prompt in prompts) + max_tokens
    length = min(max(longest, 2), positions)
    config = EngineConfig(
        max_model_len=length,
        max_num_seqs=1,
        kv_cache_tokens=-(-length // PAGE_SIZE) * PAGE_SIZE,
        max_cached_images=max(1, *(len(prompt.tiles) for prompt in prompts)),
        prefix_caching=False,
    )
    engine = Engine(model, processor.tokenizer, processor.image_config, generation, config)
    builder = RequestBuilder(processor, model.config, generation, length, seed=0)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    recorder = Recorder.of_stages(our_taps(model), order)
    for case, prompt in zip(cases, prompts, strict=True):
        request = builder.build(prompt, params)
        # Nothing of the case before is reused
        engine.reset()
        engine.add(request)
        with recorder.recording() as found:
            while engine.has_work:
                engine.step()
        if request.error is not None:
            raise request.error
        answer = request.output().outputs[0]
        recording = prompt_recording(
            case, processors.of(case), prompt, list(answer.token_ids), answer.text
        )
        recording.stages |= model_stages(model, found, prompt.tiles, recording)
        yield recording


def model_stages(
    model: Idefics2,
    found: dict[str, list[Tensor]],
    tiles: Sequence[Tile],
    recording: CaseRecording,
) -> dict[str, list[Tensor]]:
    """Return the parts of each stage that hooks ``found``, and the logits if there are any.

    Logits are those of every token, and need the hook of the text model's norm. The engine encodes
    equal tiles once, in the order in which they first occur.
    """
    encoded_once = unique_tiles(tiles)
    lengths = len(recording.prompt_ids), len(recording.answer_ids)
    parts: dict[str, list[Tensor]] = {}
    for stage, tensors in found.items():
        unit = stages.unit(stage)
        whole = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
        if unit == "token":
            parts[stage] = token_parts(whole, *lengths)
            continue
        latents = model.config.perceiver.num_latents
        sizes = [latents if unit == "latent" else tile.num_patches for tile in encoded_once]
        names = [tile.fingerprint for tile in encoded_once]
        encoded = dict(zip(names, whole.split(sizes), strict=True))
        parts[stage] = [encoded[tile.fingerprint] for tile in tiles]
    if stages.TEXT_NORM not in parts:
        return parts
    with torch.inference_mode():
        hidden = torch.cat(parts[stages.TEXT_NORM]).to(model.device)
        logits = model.logits(hidden).cpu()
    parts[stages.LOGITS] = token_parts(logits, *lengths)
    return parts


def unique_tiles(tiles: Sequence[Tile]) -> list[Tile]:
    """Return ``tiles`` without repetitions, in the order in which they first occur."""
    return list({tile.fingerprint: tile for tile in tiles}.values())


def _array(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)
