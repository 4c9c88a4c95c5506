"""The workloads of the whole model: seeded requests, prompts and images, and their counts.

``offline-256`` is 256 requests whose images are not split. Seven of eight requests have one image,
the others two. Images are JPEG files in memory. Their sizes are drawn uniformly from ``SIZES``, the
number of text tokens from 16 to 256, and the number of new tokens from 16, 32, 64, 128 and 256.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_engine.images.tiling import ImageConfig, Tile, resized_size
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.prompts.tokenizer import Tokenizer

SIZES = (
    (480, 640),
    (640, 480),
    (735, 980),
    (980, 735),
    (378, 378),
    (600, 800),
    (980, 980),
    (427, 640),
)
"""Sizes of images, (height, width) in pixels."""

# Fewest and most text tokens of a request
TEXT_TOKENS = (16, 256)
NEW_TOKENS = (16, 32, 64, 128, 256)
OFFLINE_REQUESTS = 256
# Prompt tokens of a sequence in decode cases without ``-s``
DECODE_CONTEXT = 200
# Decode steps that are timed together
STEPS_IN_A_ROW = 8
LATENCY_CASES = (
    "decode-b1",
    "decode-b32",
    "decode-b128",
    "image-980-b8",
    "image-378x504-b16",
    "image-mixed-b16",
    "prefill-4096",
    "prefill-16384",
)

_DECODE = re.compile(r"decode-b([1-9]\d*)(?:-s([1-9]\d*))?")
_IMAGE = re.compile(r"image-(?:(mixed)|([1-9]\d*)(?:x([1-9]\d*))?)-b([1-9]\d*)")
_PREFILL = re.compile(r"prefill-([1-9]\d*)")
# With noise of this amplitude (of 255) images compress about as well as photographs
_NOISE = 6


@dataclass(frozen=True)
class Counts:
    """The amount of work. An image is one file, and one tile because images are not split."""

    images: int = 0
    patches: int = 0
    image_tokens: int = 0
    # Tokens of prompts that are not image tokens
    text_tokens: int = 0
    new_tokens: int = 0

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the nonzero counts per second, as ``images_per_s`` and so on."""
        return {f"{name}_per_s": n / seconds for name, n in asdict(self).items() if n}


@dataclass(frozen=True)
class OfflineRequest:
    """A prompt with its images as JPEG files, and the number of tokens to generate."""

    # All image tokens of each image are included
    prompt_token_ids: list[int]
    sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels
    images: tuple[bytes, ...]
    max_tokens: int

    def prompt(self) -> dict[str, Any]:
        """Return the prompt as a row of ``LLM.iterate``."""
        return {
            "prompt_token_ids": self.prompt_token_ids,
            "multi_modal_data": {"image": list(self.images)},
        }


@dataclass(frozen=True)
class LatencyCase:
    """A case to time, whose ``kernel`` is "step", "image" or "prefill"."""

    kernel: str
    name: str
    batch: int = 1
    # Prompt tokens of each sequence
    length: int = 0
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels


def latency_case(name: str) -> LatencyCase:
    """Return the case called ``name``.

    Names have the forms ``decode-b32``, ``decode-b2-s64``, ``image-980-b8``, ``image-378x504-b16``,
    ``image-mixed-b16`` and ``prefill-4096``, with any positive numbers.

    Raises:
        ValueError: ``name`` has none of these forms.
    """
    if found := _DECODE.fullmatch(name):
        return LatencyCase("step", name, int(found[1]), int(found[2] or DECODE_CONTEXT))
    if found := _PREFILL.fullmatch(name):
        return LatencyCase("prefill", name, length=int(found[1]))
    if found := _IMAGE.fullmatch(name):
        batch = int(found[4])
        if found[1]:
            drawn = np.random.default_rng(batch).integers(0, len(SIZES), batch)
            return LatencyCase("image", name, batch, sizes=tuple(SIZES[i] for i in drawn))
        size = int(found[2]), int(found[3] or found[2])
        return LatencyCase("image", name, batch, sizes=(size,) * batch)
    raise ValueError(f"case must be one like {', '.join(LATENCY_CASES)}, got {name!r}")


def offline_requests(
    processor: Processor, count: int = OFFLINE_REQUESTS, seed: int = 0, shrink: int = 1
) -> list[OfflineRequest]:
    """Draw ``count`` requests. Their numbers of text and new tokens are divided by ``shrink``."""
    random = np.random.default_rng(seed)
    noise = random.integers(-_NOISE, _NOISE + 1, (*np.max(SIZES, axis=0), 3), dtype=np.int16)
    requests = []
    for index in range(count):
        num_images = 2 if index % 8 == 7 else 1
        sizes = tuple(SIZES[i] for i in random.integers(0, len(SIZES), num_images))
        num_text = int(random.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
        max_tokens = int(random.choice(NEW_TOKENS))
        text = text_tokens(processor.tokenizer, num_text, random)[: max(1, num_text // shrink)]
        requests.append(
            OfflineRequest(
                [*_opening(processor, num_images), *text],
                sizes,
                tuple(_jpeg(size, noise, random) for size in sizes),
                max(1, max_tokens // shrink),
            )
        )
    return requests


def offline_name(count: int, shrink: int) -> str:
    """Return the name of the workload that ``offline_requests`` draws with its default seed."""
    return f"offline-{count}" + (f"-shrink{shrink}" if shrink > 1 else "")


def offline_counts(requests: Sequence[OfflineRequest], processor: Processor) -> Counts:
    """Count the work of ``requests`` without opening an image. No image may be split."""
    prompts = [request.prompt_token_ids for request in requests]
    image_tokens = sum(ids.count(processor.tokenizer.image_id) for ids in prompts)
    sizes = [size for request in requests for size in request.sizes]
    return Counts(
        images=len(sizes),
        patches=sum(_num_patches(*size, processor) for size in sizes),
        image_tokens=image_tokens,
        text_tokens=sum(map(len, prompts)) - image_tokens,
        new_tokens=sum(request.max_tokens for request in requests),
    )


def text_tokens(tokenizer: Tokenizer, count: int, random: np.random.Generator) -> list[int]:
    """Draw ``count`` token ids that are not control tokens."""
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.control_ids))
    return [int(id) for id in random.choice(ordinary, count)]


def tiles(case: LatencyCase, patch_size: int, grid_side: int, seed: int = 0) -> list[Tile]:
    """Draw the images of ``case`` as tiles of random pixels."""
    random = np.random.default_rng(seed)
    return [
        Tile(random.integers(0, 256, (*size, 3), dtype=np.uint8), patch_size, grid_side)
        for size in case.sizes
    ]


def _opening(processor: Processor, num_images: int) -> list[int]:
    """Return the tokens before a text: the bos token, if any, and its images' tokens."""
    tokenizer = processor.tokenizer
    fake, image = tokenizer.fake_image_id, [tokenizer.image_id] * processor.image_seq_len
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *[fake, *image] * num_images, fake]


def _num_patches(height: int, width: int, processor: Processor) -> int:
    config: ImageConfig = processor.image_config
    size = resized_size(width, height, config.longest_edge, config.shortest_edge)
    return (size[0] // processor.patch_size) * (size[1] // processor.patch_size)


def _jpeg(
    size: tuple[int, int], noise: npt.NDArray[np.int16], random: np.random.Generator
) -> bytes:
    """Return an image of smooth colors with a little noise as a JPEG file."""
    height, width = size
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels = (smooth + noise[:height, :width]).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
