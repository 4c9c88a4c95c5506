"""What all workloads share: text, tiles, counts."""

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from idefics2_engine.images.tiling import Tile
from idefics2_engine.jobs.plan.latency_case import LatencyCase
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.tokenizer import Tokenizer

# Decode steps that are timed together
STEPS_IN_A_ROW = 8


@dataclass(frozen=True)
class Counts:
    """The amount of work. An image is one file, and without splitting one tile."""

    images: int = 0
    patches: int = 0
    image_tokens: int = 0
    # Tokens of prompts that are not image tokens
    text_tokens: int = 0
    new_tokens: int = 0

    @classmethod
    def of(cls, case: LatencyCase, config: ModelConfig) -> "Counts":
        """Count the work of ``case``: of one decode step, prompt, or pass over the images."""
        if case.kernel == "step":
            return cls(new_tokens=case.batch)
        if case.kernel == "prefill":
            return cls(text_tokens=case.length, new_tokens=1)
        side = config.vision.patch_size
        return cls(
            images=case.batch,
            patches=sum((height // side) * (width // side) for height, width in case.sizes),
            image_tokens=case.batch * config.perceiver.num_latents,
        )

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the nonzero counts per second, as ``images_per_s`` and so on."""
        return {f"{name}_per_s": n / seconds for name, n in asdict(self).items() if n}


def misfit(case: LatencyCase, config: ModelConfig, new_tokens: int = 1) -> str | None:
    """Return why a model of ``config`` cannot run ``case``, or ``None`` if it can.

    ``new_tokens`` are those of each sequence of a case with text.
    """
    text, vision = config.text, config.vision
    if case.kernel == "image":
        longest = max(max(size) for size in case.sizes)
        if longest // vision.patch_size > vision.grid:
            return (
                f"{case.name}: the model's images have at most {vision.image_size} pixels a side, "
                f"got {longest}"
            )
        return None
    wanted = case.length + new_tokens
    if wanted > text.max_positions:
        return (
            f"{case.name}: the model must have {wanted} positions for it, got {text.max_positions}"
        )
    return None


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
