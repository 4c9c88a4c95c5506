"""Tiny random Idefics2 models in transformers, the oracle, and the same weights in this engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

from idefics2_engine.images.tiling import Tile
from idefics2_engine.model.batch import ImageBatch

IMAGE_TOKEN = 95
VOCAB = 99
LATENTS = 5
PATCH = 14
GRID = 8


@dataclass(frozen=True)
class TinyCase:
    """A configuration and its batch: the (height, width) in pixels of each sample's tiles."""

    name: str
    tiles: tuple[tuple[tuple[int, int], ...], ...]
    # Text tokens of each sample besides its image tokens
    text_lengths: tuple[int, ...]
    vision: dict[str, Any] = field(default_factory=dict)
    perceiver: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    tied: bool = False

    def config(self) -> Idefics2Config:
        """Build transformers' configuration."""
        return Idefics2Config(
            vision_config={
                "hidden_size": 48,
                "intermediate_size": 67,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": GRID * PATCH,
                "patch_size": PATCH,
                **self.vision,
            },
            perceiver_config={
                "hidden_size": 64,
                "rms_norm_eps": 1e-5,
                "resampler_n_latents": LATENTS,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 24,
                "num_key_value_heads": 2,
                **self.perceiver,
            },
            text_config={
                "model_type": "mistral",
                "hidden_size": 64,
                "intermediate_size": 88,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "sliding_window": 4096,
                "pad_token_id": 0,
                **self.text,
            },
            image_token_id=IMAGE_TOKEN,
            tie_word_embeddings=self.tied,
        )

    def make_tiles(self) -> list[list[Tile]]:
        """Draw random pixels for every tile."""
        random = np.random.default_rng(len(self.name))
        return [
            [
                Tile(random.integers(0, 256, (*size, 3), dtype=np.uint8), PATCH, GRID)
                for size in sample
            ]
            for sample in self.tiles
        ]

    def token_ids(self) -> list[list[int]]:
        """Draw text tokens around each sample's runs of image tokens."""
        random = np.random.default_rng(7)
        samples = []
        for sample, length in zip(self.tiles, self.text_lengths, strict=True):
            ids = random.integers(3, IMAGE_TOKEN, length).tolist()
            for i, _ in enumerate(sample):
                at = min(1 + 2 * i, length) + i * LATENTS
                ids[at:at] = [IMAGE_TOKEN] * LATENTS
            samples.append(ids)
        return samples


def build_oracle(
    case: TinyCase, dtype: torch.dtype = torch.float32, config: Idefics2Config | None = None
) -> Any:
    """Build a random model whose latents and biases differ, as trained ones do."""
    torch.manual_seed(0)
    model: Any = Idefics2ForConditionalGeneration(config or case.config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "latents")):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    # No dropout is configured, so train and eval mode compute the same
    return model.to(dtype)


def padded_pixels(samples: list[list[Tile]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad tiles to transformers' ``pixel_values`` and ``pixel_attention_mask``."""
    count = max(len(tiles) for tiles in samples)
    H, W = (max(t.pixels.shape[i] for tiles in samples for t in tiles) for i in (0, 1))
    values = torch.zeros(len(samples), count, 3, H, W)
    mask = torch.zeros(len(samples), count, H, W, dtype=torch.int64)
    for i, tiles in enumerate(samples):
        for j, tile in enumerate(tiles):
            h, w = tile.pixels.shape[:2]
            pixels = torch.from_numpy(tile.pixels).permute(2, 0, 1)
            values[i, j, :, :h, :w] = (pixels / 255 - 0.5) / 0.5
            mask[i, j, :h, :w] = 1
    return values, mask


def padded_ids(case: TinyCase, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the token ids of all samples on one side; return them and their attention mask."""
    rows = case.token_ids()
    width = max(len(ids) for ids in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[i, place] = torch.tensor(ids)
        mask[i, place] = 1
    return input_ids, mask


def oracle_inputs(case: TinyCase) -> dict[str, torch.Tensor]:
    """Return the batch of ``case`` as keyword arguments of transformers' model."""
    input_ids, mask = padded_ids(case)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if any(case.tiles):
        inputs["pixel_values"], inputs["pixel_attention_mask"] = padded_pixels(case.make_tiles())
    return inputs


def image_batch(samples: list[list[Tile]]) -> ImageBatch | None:
    """Pack the tiles of all samples in order."""
    tiles = [tile for sample in samples for tile in sample]
    return ImageBatch.from_tiles(tiles) if tiles else None


def save_oracle(model: Any, folder: Path) -> Path:
    """Write the oracle as a checkpoint in the hub's format."""
    model.save_pretrained(folder)
    return folder


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make a smooth random RGB image."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


CASES = (
    TinyCase("one-image", (((112, 112),),), (9,)),
    TinyCase("partial-patches", (((45, 83),),), (9,)),
    TinyCase("several-images", (((56, 70), (98, 42), (28, 28)),), (12,)),
    TinyCase("mixed-batch", (((56, 70),), ((112, 30), (14, 14)), ((70, 56),)), (6, 17, 11)),
    TinyCase("row-without-image", (((56, 56),), ()), (6, 9)),
    TinyCase("no-image", ((), ()), (5, 8)),
    TinyCase("splitting", (((56, 56),) * 4 + ((112, 112),),), (8,)),
    TinyCase("short-window", (((56, 56),),), (60,), text={"sliding_window": 7}),
    TinyCase("window-of-one", (((56, 56),),), (20,), text={"sliding_window": 1}),
    TinyCase("no-window", (((56, 56),),), (20,), text={"sliding_window": None}),
    TinyCase(
        "head-dims-72-96-128",
        (((56, 84),), ((42, 42),)),
        (7, 10),
        vision={"hidden_size": 144, "num_attention_heads": 2},
        perceiver={"resampler_n_heads": 2, "resampler_head_dim": 96, "num_key_value_heads": 1},
        text={"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    TinyCase("tied-head", (((56, 70),),), (9,), tied=True),
    TinyCase(
        "other-constants",
        (((56, 70),),),
        (30,),
        vision={"layer_norm_eps": 1e-3},
        perceiver={"rms_norm_eps": 1e-3},
        text={
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    TinyCase("multi-query", (((56, 70),),), (9,), text={"num_key_value_heads": 1}),
)
