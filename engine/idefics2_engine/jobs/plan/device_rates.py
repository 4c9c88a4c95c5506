"""How long the device needs for the useful work of a job, and for nothing else.

Useful work is the patches of distinct images, the squares of each tile's patches, prompt tokens
that no cache has, and decode steps. Padding is no useful work. Its rates are those of rows of
``idefics2 bench latency``:

    seconds = patches * a + squares * b + prompt tokens * c + sum of s(batch) over decode steps

``a`` and ``b`` are fitted to the rows of images, ``c`` is the time of a token in the shortest
prompt, and ``s`` is interpolated between the rows of decode steps. The decode steps are those of an
ideal schedule: the longest answers start first, and a sequence starts whenever another one ends.
"""

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from idefics2_engine.jobs.plan.latency_case import latency_case

Row = dict[str, Any]

PEER = "transformers"
"""What is timed beside the engine. The names of its rows begin with it."""

# The end of the names of cases with quantized weights
_NF4 = "-nf4"


@dataclass(frozen=True)
class Work:
    """The useful work of a job.

    Attributes:
        tiles: How many tiles have so many patches.
        prompt_tokens: Tokens of prompts, including image tokens.
        answers: How many answers have so many tokens. The first token of an answer is part of the
            prompt's work.
        sequences: Most sequences at once.
    """

    tiles: Counter[int]
    prompt_tokens: int
    answers: Counter[int]
    sequences: int

    @property
    def patches(self) -> int:
        """Patches of all tiles."""
        return sum(patches * count for patches, count in self.tiles.items())

    @property
    def squares(self) -> int:
        """Squares of each tile's patches, to which attention's work is proportional."""
        return sum(patches**2 * count for patches, count in self.tiles.items())


@dataclass(frozen=True)
class Rates:
    """Seconds of useful work.

    Attributes:
        patch: Seconds of a patch, attention apart.
        square: Seconds of a pair of patches of a tile.
        token: Seconds of a prompt token.
        steps: Seconds of a decode step by the number of its sequences.
    """

    patch: float
    square: float
    token: float
    steps: Mapping[int, float]

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], patch_size: int, quantization: str | None = None
    ) -> "Rates":
        """Fit the rates to the engine's own rows of ``bench latency`` with this ``quantization``.

        Raises:
            ValueError: There is no row of images, of a prompt or of a decode step.
        """
        own = [
            row
            for row in rows
            if "ms" in row
            and not row["impl"].startswith(PEER)
            and row["case"].endswith(_NF4) == (quantization is not None)
        ]
        by_kernel = {kernel: _of_kernel(own, kernel) for kernel in ("image", "prefill", "step")}
        patch, square = _fit_images(by_kernel["image"], patch_size)
        prompt = min(by_kernel["prefill"], key=lambda row: int(row["text_tokens"]))
        return cls(
            patch,
            square,
            prompt["ms"] / 1e3 / prompt["text_tokens"],
            {row["batch"]: row["ms"] / 1e3 for row in by_kernel["step"]},
        )

    def step(self, batch: int) -> float:
        """Return the seconds of a decode step of ``batch`` sequences.

        Beyond the rows the line through the two nearest ones goes on.
        """
        batches = sorted(self.steps)
        if len(batches) == 1:
            return self.steps[batches[0]]
        place = min(max(bisect_left(batches, batch), 1), len(batches) - 1)
        low, high = batches[place - 1 : place + 1]
        slope = (self.steps[high] - self.steps[low]) / (high - low)
        return self.steps[low] + slope * (batch - low)

    def __str__(self) -> str:
        """Return the formula with its numbers."""
        steps = ", ".join(f"{n}: {1e3 * self.steps[n]:.2f}" for n in sorted(self.steps))
        return (
            f"patches x {1e6 * self.patch:.3f} us + squares x {1e12 * self.square:.1f} ps"
            f" + prompt tokens x {1e6 * self.token:.2f} us"
            f" + decode steps by sequences (ms: {steps})"
        )


def bound_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Return the seconds of the useful ``work`` by kind."""
    counts = step_counts(work.answers, work.sequences)
    return {
        "images": work.patches * rates.patch + work.squares * rates.square,
        "prompts": work.prompt_tokens * rates.token,
        "decode": sum(count * rates.step(batch) for batch, count in counts.items()),
    }


def step_counts(answers: Counter[int], sequences: int) -> dict[int, int]:
    """Return how many decode steps of each batch size an ideal schedule has."""
    ends = [0] * sequences
    changes: dict[int, int] = {}
    longest_first = Counter(dict(sorted(answers.items(), reverse=True)))
    for steps in (tokens - 1 for tokens in longest_first.elements()):
        begin = ends[0]
        heapq.heapreplace(ends, begin + steps)
        changes[begin] = changes.get(begin, 0) + 1
        changes[begin + steps] = changes.get(begin + steps, 0) - 1
    counts: dict[int, int] = {}
    running, places = 0, sorted(changes)
    for place, following in pairwise(places):
        running += changes[place]
        if running:
            counts[running] = counts.get(running, 0) + following - place
    return counts


def _of_kernel(rows: list[Row], kernel: str) -> list[Row]:
    found = [row for row in rows if row["kernel"] == kernel]
    if not found:
        raise ValueError(f"rates: must have a row of kernel {kernel!r}, got none")
    return found


def _fit_images(rows: list[Row], patch_size: int) -> tuple[float, float]:
    """Return the seconds of a patch and of a pair, with the least relative squared error.

    With one kind of image, or if the fit has a negative number, pairs cost nothing.
    """
    works, seconds = [], []
    for row in rows:
        sizes = latency_case(row["case"].removesuffix(_NF4)).sizes
        each = [(height // patch_size) * (width // patch_size) for height, width in sizes]
        works.append((sum(each), sum(patches**2 for patches in each)))
        seconds.append(row["ms"] / 1e3)
    scaled = np.array(works, float) / np.array(seconds)[:, None]
    ones = np.ones(len(rows))
    (patch, square), _, rank, _ = np.linalg.lstsq(scaled / scaled.max(0), ones, rcond=None)
    if rank == 2 and min(patch, square) >= 0:
        return float(patch / scaled[:, 0].max()), float(square / scaled[:, 1].max())
    return float(scaled[:, 0] @ ones / (scaled[:, 0] @ scaled[:, 0])), 0.0
