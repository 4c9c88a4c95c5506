"""The sizes of the runtime; frozen, derived values are properties."""

from dataclasses import dataclass

# Tokens of the KV cache that are allocated and freed together
PAGE_SIZE = 64


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the runtime."""

    max_model_len: int  # tokens of a prompt with its answer
    max_num_seqs: int  # sequences that run at once
    kv_cache_tokens: int  # tokens that the KV cache holds
    max_num_batched_tokens: int = 8192  # of one step
    # That one step encodes. It bounds the memory of encoding, 90 KB a patch of the 8B model
    max_patches: int = 8 * 4900
    max_cached_images: int = 256  # images and sub-images whose embeddings are kept
    prefix_caching: bool = True
    page_size: int = PAGE_SIZE  # tokens
    cuda_graphs: bool = False  # whether decode steps are captured and replayed
    # Whether a step is launched before the last one's tokens have been read
    run_ahead: bool = False

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""
        return -(-self.kv_cache_tokens // self.page_size)
