"""The cases of ``idefics2 bench latency``, and what all workloads share: sizes, text, counts."""

import re
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from idefics2_engine.images.tiling import Tile
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


@dataclass(frozen=True)
class Counts:
    """The amount of work. An image is one file, and without splitting one tile."""

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


def text_tokens(tokenizer: Tokenizer, count: int, random: np.random.Generator) -> list[int]:
    """Draw ``count`` token ids that are not control tokens."""
    ordinary = _ordinary_ids(tokenizer.vocab_size, frozenset(tokenizer.control_ids))
    drawn: list[int] = random.choice(ordinary, count).tolist()
    return drawn


def tiles(case: LatencyCase, patch_size: int, grid_side: int, seed: int = 0) -> list[Tile]:
    """Draw the images of ``case`` as tiles of random pixels."""
    random = np.random.default_rng(seed)
    return [
        Tile(random.integers(0, 256, (*size, 3), dtype=np.uint8), patch_size, grid_side)
        for size in case.sizes
    ]


@cache
def _ordinary_ids(vocab_size: int, control_ids: frozenset[int]) -> npt.NDArray[np.int64]:
    return np.setdiff1d(np.arange(vocab_size), sorted(control_ids))
