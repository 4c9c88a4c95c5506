"""What an engine has done so far, counted apart: images and text, in and out."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the engine was built; the engine adds to them after each step."""

    steps: int = 0
    computed_tokens: int = (
        0  # of prompts and answers, image tokens and what was computed again included
    )
    generated_tokens: int = 0
    encoded_tiles: int = 0  # those that the encoder cache knew are not
    encoded_patches: int = 0
    cache_usage: float = 0.0  # share of the KV cache's pages that are held, after the last step
