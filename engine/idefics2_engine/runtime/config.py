"""Sizes of the runtime."""

from dataclasses import dataclass

from idefics2_engine.errors import ConfigError
from idefics2_engine.field_checks import Whole

# These bounds are far above any use. A larger number is a mistake and must be reported before
# anything of that size is allocated.
AT_ONCE = Whole(1, 1 << 20)
"""Answers at once, and tokens of a step."""
LENGTH = Whole(2, 1 << 20)
"""Tokens of a prompt and its answer."""
CACHE_TOKENS = Whole(1, 2**31 - 1)
"""Tokens of the KV cache."""

_NUM_SEQS_GPU = 256
_NUM_SEQS_CPU = 64

# A page is the unit of allocation in the KV cache, in tokens
PAGE_SIZE = 64


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the runtime.

    Attributes:
        max_model_len: Most tokens of a prompt and its answer together.
        max_num_seqs: Most sequences that run at once.
        kv_cache_tokens: Tokens that the KV cache holds.
        max_num_batched_tokens: Most tokens of one step.
        max_patches: Most patches that one step encodes. It bounds the memory of encoding, which is
            90 KB per patch for the 8B model.
        max_cached_images: Images and sub-images whose embeddings are kept.
        prefix_caching: Whether prompts with a common prefix share its KV cache.
        page_size: Tokens of a page.
        cuda_graphs: Whether steps are captured as CUDA graphs and replayed.
        prompt_graphs: Whether, with ``cuda_graphs``, steps with prompts and images are captured too,
            not decode steps alone. Without them an engine starts faster and takes less memory.
        share_prefix_reads: Whether decode steps read the pages of shared prefixes once for several
            sequences.
        run_ahead: Whether a step is launched before the previous step's tokens are read.
    """

    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int
    max_num_batched_tokens: int = 8192
    max_patches: int = 8 * 4900
    max_cached_images: int = 256
    prefix_caching: bool = True
    page_size: int = PAGE_SIZE
    cuda_graphs: bool = False
    prompt_graphs: bool = True
    share_prefix_reads: bool = False
    run_ahead: bool = False

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""
        return -(-self.kv_cache_tokens // self.page_size)


def default_num_seqs(*, on_gpu: bool) -> int:
    """Return the answers at once where no number is given.

    A GPU reads its weights once a step, so its rate grows with the number. A CPU has reached its
    rate with fewer.
    """
    return _NUM_SEQS_GPU if on_gpu else _NUM_SEQS_CPU


def model_length(max_model_len: int | None, positions: int) -> int:
    """Return the most tokens of a prompt and its answer; ``None`` is all of the model's positions.

    Raises:
        ConfigError: The model has fewer positions.
    """
    length = positions if max_model_len is None else max_model_len
    if length > positions:
        raise ConfigError(f"max_model_len must be from 2 to the model's {positions}, got {length}")
    return length
