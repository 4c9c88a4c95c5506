"""Memory of a model and its engine, computed from the config by the engine's own formulas."""

import math
from dataclasses import dataclass

from idefics2_engine.checkpoint.tensor_mapping import HubTensor, hub_tensors
from idefics2_engine.doctor import facts
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig

IDEFICS2_8B = ModelConfig.from_dict(
    {
        "model_type": "idefics2",
        "image_token_id": 32001,
        "text_config": {
            "model_type": "mistral",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32003,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 980,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
)
"""The shape of HuggingFaceM4/idefics2-8b."""

_PADDED = ("text.embedding", "lm_head")
_BF16 = 2


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model takes with an engine of the default sizes.

    Attributes:
        weights: All weights.
        beside: Embeddings of cached images and the largest step.
        token: Keys and values of a token.
        positions: Most tokens of a sequence.
    """

    weights: int
    beside: int
    token: int
    positions: int

    def whole(self, tokens: int) -> int:
        """Return the bytes with a KV cache of ``tokens``."""
        return self.weights + self.beside + tokens * self.token

    def tokens_in(self, available: int) -> int:
        """Return the most tokens of a KV cache, in whole pages; negative if weights do not fit."""
        pages = (available - self.whole(0)) // (self.token * PAGE_SIZE)
        return pages * PAGE_SIZE


def memory_need(config: ModelConfig, *, nf4: bool) -> MemoryNeed:
    """Return the memory on a GPU, in bf16 with or without NF4 weights."""
    engine = EngineConfig(config.text.max_positions, max_num_seqs=1, kv_cache_tokens=0)
    cached = engine.max_cached_images * config.perceiver.num_latents * config.text.hidden_size
    patches = min(engine.max_patches, facts.GRAPH_PATCHES)
    # The projection to the text model's width is the widest step: a patch's gate, its up-projection
    # and their product, beside the patch itself
    patch = 3 * config.text.intermediate_size + config.vision.hidden_size
    return MemoryNeed(
        weights=weight_bytes(config, _BF16, nf4=nf4),
        beside=_BF16 * (cached + patches * patch),
        token=_BF16 * config.text.kv_values,
        positions=config.text.max_positions,
    )


def weight_bytes(config: ModelConfig, itemsize: int, *, nf4: bool = False) -> int:
    """Return the bytes of all weights, in NF4 those of the linear layers."""
    return sum(
        _nf4_bytes(tensor) if nf4 and tensor.is_linear else itemsize * _numel(tensor, config)
        for tensor in hub_tensors(config)
    )


def download_bytes(config: ModelConfig) -> int:
    """Return the bytes of the checkpoint on the hub, which is in fp32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in hub_tensors(config))


def largest_tensor_bytes(config: ModelConfig) -> int:
    """Return the bytes of the largest tensor of the checkpoint on the hub."""
    return 4 * max(math.prod(tensor.shape) for tensor in hub_tensors(config))


def _numel(tensor: HubTensor, config: ModelConfig) -> int:
    if tensor.parameter in _PADDED:
        return config.text.padded_vocab_size * config.text.hidden_size
    return math.prod(tensor.shape)


def _nf4_bytes(tensor: HubTensor) -> int:
    """Return the bytes of a weight in NF4 with double quantization."""
    numel = math.prod(tensor.shape)
    blocks = -(-numel // facts.NF4_BLOCK)
    nested = -(-blocks // facts.NF4_NESTED_BLOCK)
    # Half a byte for each element, a byte for each block, and two numbers for each nested block
    return -(-numel // 2) + blocks + 2 * 4 * nested + facts.NF4_NESTED_CODE_BYTES
