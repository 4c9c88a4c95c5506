"""The cases of ``idefics2 bench latency``, by whose names its rows are read."""

import re
from dataclasses import dataclass

import numpy as np

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
_DECODE_CONTEXT = 200
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
        return LatencyCase("step", name, int(found[1]), int(found[2] or _DECODE_CONTEXT))
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
