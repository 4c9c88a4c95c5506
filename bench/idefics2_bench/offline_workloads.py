"""The workloads of ``idefics2 bench offline``: seeded requests with JPEG files in memory.

- ``mixed``: 1 image in 7 of 8 requests, else 2; sizes drawn evenly from ``SIZES``; 16 to 256 text
  tokens, evenly; 16, 32, 64, 128 or 256 new tokens, evenly.
- ``text``: the requests of ``mixed`` without images. Text tokens replace the image's, so prompts
  are as long.
- ``vqa``: an image of 640 x 480, 24 text tokens, 4 new tokens.
- ``shared``: one image and 1,000 text tokens that all requests begin with, 24 own text tokens, 32
  new tokens. Each request has a copy of the file.
- ``split``: an image of 735 x 980 that is split into five tiles, 24 text tokens, 64 new tokens.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_bench.workloads import Counts, text_tokens
from idefics2_engine.images.tiling import tile_sizes
from idefics2_engine.jobs.plan.latency_case import SIZES
from idefics2_engine.prompts.processor import Processor

# A request of ``mixed`` has at least and at most so many text tokens
TEXT_TOKENS = (16, 256)
NEW_TOKENS = (16, 32, 64, 128, 256)
SHARED_TOKENS = 1000
_OWN_TOKENS = 24
# With noise of this amplitude, of 255, images compress about as well as photographs
_NOISE = 6
# Pillow compresses without the interpreter's lock
_JPEG_THREADS = 16

Size = tuple[int, int]
"""Height and width of an image, in pixels."""


@dataclass(frozen=True)
class OfflineRequest:
    """A prompt with its images, and how many tokens are wanted."""

    prompt_token_ids: list[int]  # image slots written out
    sizes: tuple[Size, ...]  # of each image
    images: tuple[bytes, ...]  # JPEG files
    max_tokens: int

    def prompt(self) -> dict[str, Any]:
        """Return what ``LLM.iterate`` takes."""
        return {
            "prompt_token_ids": self.prompt_token_ids,
            "multi_modal_data": {"image": list(self.images)},
        }


@dataclass(frozen=True)
class _Draft:
    """A request whose files are not made.

    Attributes:
        request: The request without images.
        colors: For each image, the colors (12, 16, 3) that its pixels are interpolated from.
    """

    request: OfflineRequest
    colors: tuple[npt.NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Workload:
    """One of the workloads.

    Attributes:
        count: Requests, by default.
        is_split: Whether images are split.
        draw: Draws requests, given the processor, their number, the seed's random numbers and the
            divisor of their tokens.
    """

    count: int
    is_split: bool
    draw: Callable[[Processor, int, np.random.Generator, int], list[_Draft]]

    def processor(self, processor: Processor) -> Processor:
        """Return ``processor`` with the workload's splitting."""
        config = replace(processor.image_config, split=self.is_split)
        return replace(processor, image_config=config)


def offline_requests(
    name: str, processor: Processor, count: int, seed: int = 0, shrink: int = 1
) -> list[OfflineRequest]:
    """Draw ``count`` requests of the workload ``name``; ``shrink`` divides text and new tokens."""
    random = np.random.default_rng(seed)
    noise = random.integers(-_NOISE, _NOISE + 1, (*np.max(SIZES, axis=0), 3), dtype=np.int16)
    drafts = WORKLOADS[name].draw(processor, count, random, shrink)

    with ThreadPoolExecutor(_JPEG_THREADS) as pool:
        # An image of several requests is made once, and each gets a copy
        files: dict[int, Future[bytes]] = {}
        for draft in drafts:
            for size, colors in zip(draft.request.sizes, draft.colors, strict=True):
                if id(colors) not in files:
                    files[id(colors)] = pool.submit(_jpeg, size, colors, noise)
        return [
            replace(
                draft.request,
                images=tuple(bytes(bytearray(files[id(one)].result())) for one in draft.colors),
            )
            for draft in drafts
        ]


def offline_name(name: str, count: int, shrink: int) -> str:
    """Name the case of ``count`` requests of the workload ``name``."""
    head = "offline" if name == "mixed" else name
    return f"{head}-{count}" + (f"-shrink{shrink}" if shrink > 1 else "")


def offline_counts(requests: Sequence[OfflineRequest], processor: Processor) -> Counts:
    """Count what is in ``requests``, without opening an image, split as ``processor`` does."""
    prompts = [request.prompt_token_ids for request in requests]
    image_tokens = sum(ids.count(processor.tokenizer.image_id) for ids in prompts)
    sizes = [size for request in requests for size in request.sizes]
    return Counts(
        images=len(sizes),
        patches=sum(sum(tile_patches(size, processor)) for size in sizes),
        image_tokens=image_tokens,
        text_tokens=sum(map(len, prompts)) - image_tokens,
        new_tokens=sum(request.max_tokens for request in requests),
    )


def tile_patches(size: Size, processor: Processor) -> list[int]:
    """Return the number of patches of each tile of an image."""
    height, width = size
    patch, sides = processor.patch_size, tile_sizes((width, height), processor.image_config)
    return [(columns // patch) * (rows // patch) for columns, rows in sides]


def distinct_images(requests: Sequence[OfflineRequest]) -> list[Size]:
    """Return the sizes of all files that differ."""
    sizes: dict[bytes, Size] = {}
    for request in requests:
        sizes |= zip(request.images, request.sizes, strict=True)
    return list(sizes.values())


def _mixed(
    processor: Processor, count: int, random: np.random.Generator, shrink: int
) -> list[_Draft]:
    drafts = []
    for index in range(count):
        num_images = 2 if index % 8 == 7 else 1
        sizes = tuple(SIZES[i] for i in random.integers(0, len(SIZES), num_images))
        num_text = int(random.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
        max_tokens = int(random.choice(NEW_TOKENS))
        text = text_tokens(processor.tokenizer, num_text, random)[: max(1, num_text // shrink)]
        ids = [*_opening(processor, num_images), *text]
        request = OfflineRequest(ids, sizes, (), max(1, max_tokens // shrink))
        drafts.append(_Draft(request, tuple(_colors(random) for _ in sizes)))
    return drafts


def _text(
    processor: Processor, count: int, random: np.random.Generator, shrink: int
) -> list[_Draft]:
    tokenizer = processor.tokenizer
    slots = {tokenizer.image_id, tokenizer.fake_image_id}
    drafts = []
    for draft in _mixed(processor, count, random, shrink):
        ids = draft.request.prompt_token_ids
        instead = iter(text_tokens(tokenizer, len(ids), random))
        ids = [next(instead) if id in slots else id for id in ids]
        drafts.append(_Draft(OfflineRequest(ids, (), (), draft.request.max_tokens), ()))
    return drafts


def _one_image(
    processor: Processor, count: int, random: np.random.Generator, shrink: int, size: Size, new: int
) -> list[_Draft]:
    """Draw requests of an image of ``size``, a few text tokens and ``new`` new tokens."""
    drafts = []
    for _ in range(count):
        text = text_tokens(processor.tokenizer, max(1, _OWN_TOKENS // shrink), random)
        ids = [*_opening(processor, processor.image_config.tiles_per_image), *text]
        request = OfflineRequest(ids, (size,), (), max(1, new // shrink))
        drafts.append(_Draft(request, (_colors(random),)))
    return drafts


def _vqa(
    processor: Processor, count: int, random: np.random.Generator, shrink: int
) -> list[_Draft]:
    return _one_image(processor, count, random, shrink, (480, 640), 4)


def _split(
    processor: Processor, count: int, random: np.random.Generator, shrink: int
) -> list[_Draft]:
    return _one_image(processor, count, random, shrink, (735, 980), 64)


def _shared(
    processor: Processor, count: int, random: np.random.Generator, shrink: int
) -> list[_Draft]:
    text = text_tokens(processor.tokenizer, max(1, SHARED_TOKENS // shrink), random)
    beginning, colors = [*_opening(processor, 1), *text], _colors(random)
    drafts = []
    for _ in range(count):
        own = text_tokens(processor.tokenizer, max(1, _OWN_TOKENS // shrink), random)
        request = OfflineRequest([*beginning, *own], ((980, 980),), (), max(1, 32 // shrink))
        drafts.append(_Draft(request, (colors,)))
    return drafts


WORKLOADS = {
    "mixed": Workload(256, False, _mixed),
    "text": Workload(1024, False, _text),
    "vqa": Workload(512, False, _vqa),
    "shared": Workload(512, False, _shared),
    "split": Workload(64, True, _split),
}
"""All workloads by name."""


def _opening(processor: Processor, num_tiles: int) -> list[int]:
    """Return the start of a text and the placeholders of its tiles."""
    tokenizer = processor.tokenizer
    fake, image = tokenizer.fake_image_id, [tokenizer.image_id] * processor.image_seq_len
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *[fake, *image] * num_tiles, fake]


def _colors(random: np.random.Generator) -> npt.NDArray[np.uint8]:
    return random.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def _jpeg(size: Size, colors: npt.NDArray[np.uint8], noise: npt.NDArray[np.int16]) -> bytes:
    """Return an image of smooth colors with a little noise as a file."""
    height, width = size
    smooth = np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC))
    pixels = (smooth + noise[:height, :width]).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
