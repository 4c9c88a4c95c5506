"""The cases of ``idefics2 bench hf`` and their sizes."""

from dataclasses import dataclass

from idefics2_engine.jobs.plan.latency_case import latency_case

PREFILL = "prefill-4096"
MIXED = "images-mixed-16"
FULL = "images-980-b8"
MEMORY = "memory-generate"
GENERATE = "generate-64x128"
NF4 = "nf4-decode"

# Memory is measured before compiled programs and other engines keep some of it
CASES = (PREFILL, MIXED, FULL, MEMORY, GENERATE, NF4)
"""All cases, in the order in which they run."""

# The images are those of ``bench latency``
_LATENCY = {MIXED: "image-mixed-b16", FULL: "image-980-b8"}


@dataclass(frozen=True)
class Texts:
    """Prompts of equal length, and how many tokens continue each of them."""

    count: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of all cases.

    Attributes:
        shrink: What they are divided by, for a small machine or model.
    """

    shrink: int = 1

    @property
    def prefill(self) -> Texts:
        """The prompt of ``PREFILL``."""
        return Texts(1, self._divided(4096), 1)

    @property
    def generate(self) -> Texts:
        """The prompts of ``GENERATE`` and ``MEMORY``."""
        return Texts(self._divided(64), self._divided(128), self._divided(128))

    @property
    def decode(self) -> Texts:
        """The prompt of ``NF4``, which is short beside its answer."""
        return Texts(1, self._divided(16), self._divided(64))

    def images(self, case: str, patch_size: int) -> list[tuple[int, int]]:
        """Return the sizes (height, width) of the images of ``case``, in whole patches.

        There are at least two, so that images of different sizes are padded.
        """
        sizes = latency_case(_LATENCY[case]).sizes
        return [
            (self._whole(height, patch_size), self._whole(width, patch_size))
            for height, width in sizes[: max(2, self._divided(len(sizes)))]
        ]

    def name(self, case: str) -> str:
        """Return the name of ``case`` in a row."""
        return f"{case}-shrink{self.shrink}" if self.shrink > 1 else case

    def _divided(self, number: int) -> int:
        return max(1, number // self.shrink)

    def _whole(self, side: int, patch_size: int) -> int:
        return max(1, self._divided(side) // patch_size) * patch_size
