"""The reference with the answers of another path, in float64 or in the dtype of the weights.

The weights stay in their dtype, and are widened to float64 one layer at a time, while an operation
reads them. So the float64 path needs little more memory than the weights themselves.
"""

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import Linear
from idefics2_engine.parity.inputs import Case, Processors
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.case_recording import CaseRecording
from idefics2_engine.parity.recording.our_stages import (
    load_model,
    model_stages,
    our_taps,
    prompt_recording,
    unique_tiles,
)
from idefics2_engine.parity.recording.recorder import Recorder
from idefics2_kernels import REFERENCE


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return REFERENCE.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return REFERENCE.linear_gelu(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


WIDENING = replace(REFERENCE, linear=_linear, linear_gelu=_linear_gelu)
"""The reference, whose products widen their weights to the dtype of the activations."""


def widen_model(model: Idefics2) -> None:
    """Make ``model`` compute in float64: all parameters but those of linear layers are widened."""
    for module in model.modules():
        if not isinstance(module, Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.double()


def record_forced(
    folder: pathlib.Path,
    weights: Path,
    cases: Sequence[Case],
    answers: Sequence[CaseRecording],
    order: Sequence[str],
    *,
    device: str = "auto",
    in_float64: bool = True,
) -> Iterator[CaseRecording]:
    """Compute each case with the given answer on the reference, and yield the stages in ``order``.

    Args:
        folder: The checkpoint.
        weights: The path whose dtype and quantization the weights have.
        cases: The cases.
        answers: Recordings of another path, whose answers are given to the model.
        order: The stages.
        device: Where to compute.
        in_float64: Whether to compute in float64, and not in the weights' own dtype.

    Raises:
        Idefics2Error: The model, a prompt or an image is invalid.
    """
    processors = Processors(folder)
    model = load_model(folder, weights, device, WIDENING)
    if in_float64:
        widen_model(model)
    recorder = Recorder.of_stages(our_taps(model), order)
    for case, answer in zip(cases, answers, strict=True):
        processor = processors.of(case)
        prompt = case.process(processor)
        recording = prompt_recording(case, processor, prompt, answer.answer_ids, answer.text)
        known = recording.prompt_ids + recording.answer_ids[:-1]
        # Equal tiles are encoded once, as in the engine
        tiles = unique_tiles(prompt.tiles)
        with recorder.recording() as found, torch.inference_mode():
            features = None
            if tiles:
                images = ImageBatch.from_tiles(tiles, processor.image_config).to(model.device)
                encoded = model.image_features(images)
                names = [tile.fingerprint for tile in tiles]
                features = encoded[[names.index(tile.fingerprint) for tile in prompt.tiles]]
            model(TextBatch.from_ids([known]).to(model.device), features)
        recording.stages |= model_stages(model, found, prompt.tiles, recording)
        yield recording
