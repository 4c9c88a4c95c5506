"""Counters of the engine's work."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the engine was built, updated after each step.

    Attributes:
        steps: Forward passes.
        computed_tokens: Tokens of prompts and answers, including image tokens and recomputed ones.
        generated_tokens: Tokens of answers.
        encoded_tiles: Tiles that were encoded. Hits of the encoder cache do not count.
        encoded_patches: Patches of these tiles.
        cache_usage: Share of the KV cache's pages in use after the last step.
    """

    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    encoded_tiles: int = 0
    encoded_patches: int = 0
    cache_usage: float = 0.0
