"""The engine on the memory of transformers' model, and its answers to one call of ``generate``."""

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from idefics2_engine.device import torch_defaults
from idefics2_engine.hf.generation.texts import NoTexts, Texts
from idefics2_engine.hf.shared_weights import SharedWeights
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig
from idefics2_engine.runtime.engine import Engine
from idefics2_engine.runtime.memory_profile import bytes_per_token
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.scheduling.sequence import Request
from idefics2_kernels import REFERENCE, Ops

_logger = logging.getLogger(__name__)

# Pictures arrive normalized, so nothing reads this
_IMAGES = ImageConfig(980, 378, False, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
# More rows wait for their turn
_MOST_SEQS = 512
_MOST_CACHED_IMAGES = 256
# A step of 8,192 tokens, the default elsewhere, would be 1 % faster and take 1 GB more beside training
_STEP_TOKENS = 2048
# Of the memory that is free. The rest is for the steps themselves
_SHARE = 0.8


class ModelEngine:
    """The engine of one model: made on the first call that needs it, and larger when one needs more.

    Its KV cache has room for the largest call so far, not for the rest of the device. It has no
    weights of its own.

    Attributes:
        engine: The engine, ``None`` before the first call and after ``close``.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._weights: SharedWeights | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Leave the engine out of copies and files: a copied model makes its own."""
        return type(self), ()

    def close(self) -> None:
        """Give back the memory of the KV cache and of the CUDA graphs; the next call takes it again."""
        if self.engine is None:
            return
        self.engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget_weights(self) -> None:
        """Close, and let go of the weights, which are about to move."""
        self.close()
        self._weights = None

    def share_weights(self, model: Any, config: ModelConfig, ops: Ops) -> Idefics2:
        """Return the engine's model on the weights of transformers' ``model``.

        Raises:
            NotShareableError: The engine cannot compute with them.
        """
        if self._weights is None or not self._weights.is_current(model, config, ops):
            self.forget_weights()
            self._weights = SharedWeights(model, config, ops)
        return self._weights.packed

    def answer(
        self,
        packed: Idefics2,
        requests: Sequence[Request],
        tokenizer: Any,
        on_step: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each answer, those of a request after each other.

        Args:
            packed: The result of ``share_weights``.
            requests: At least one.
            tokenizer: transformers' tokenizer, if answers end at strings.
            on_step: Called after each step.

        Raises:
            ConfigError: The KV cache does not fit into memory.
            RequestFailedError: The model cannot run on a request.
        """
        # The caller's default device would also slow down every operation
        is_plain = torch.get_default_device().type == "cpu"
        with (
            contextlib.nullcontext() if is_plain else torch_defaults(),
            # Triton launches on the current device
            torch.cuda.device(packed.device if packed.device.type == "cuda" else -1),
        ):
            self._run(self._fitting(packed, requests), requests, tokenizer, on_step)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [
            sequence.token_ids[len(request.prompt_token_ids) :]
            for request in requests
            for sequence in request.sequences
        ]

    @staticmethod
    def _run(
        engine: Engine,
        requests: Sequence[Request],
        tokenizer: Any,
        on_step: Callable[[], None] | None,
    ) -> None:
        engine.tokenizer = NoTexts() if tokenizer is None else Texts(tokenizer)  # type: ignore[assignment]
        # The weights may have changed since the last call, and what is cached with them
        engine.reset()
        try:
            for request in requests:
                request.every_token = on_step is not None
                request.may_wait = on_step is None
                engine.add(request)
            while engine.has_work or engine.is_ahead:
                engine.step()
                if on_step is not None:
                    on_step()
        except BaseException:
            engine.reset()
            raise

    def _fitting(self, packed: Idefics2, requests: Sequence[Request]) -> Engine:
        """Return an engine with room for ``requests``."""
        wanted = _config(packed, requests)
        if self.engine is not None:
            has = self.engine.config
            if self.engine.runner.model is packed and _is_enough(has, wanted):
                return self.engine
            wanted = _larger(has, wanted)
        self.close()
        wanted = _within_memory(packed, wanted, requests)
        self.engine = Engine(
            packed,
            NoTexts(),  # type: ignore[arg-type]
            _IMAGES,
            GenerationConfig(frozenset(), ()),
            wanted,
            min_p_first=False,
        )
        self.engine.clock.start()
        _logger.info("the engine of generate has %d tokens of KV cache", wanted.kv_cache_tokens)
        return self.engine


def _config(packed: Idefics2, requests: Sequence[Request]) -> EngineConfig:
    """Return the sizes that ``requests`` need."""
    on_cuda = packed.device.type == "cuda"
    # The scheduler keeps a page free for each running sequence
    pages = sum((_pages(request) + 1) * request.params.n for request in requests)
    answers = sum(request.params.n for request in requests)
    pictures = sum(len(request.images) for request in requests)
    most = max(len(request.images) for request in requests)
    return EngineConfig(
        max_model_len=packed.config.text.max_positions,
        max_num_seqs=min(_rounded(answers), _MOST_SEQS),
        kv_cache_tokens=_rounded(pages) * PAGE_SIZE,
        max_num_batched_tokens=_STEP_TOKENS,
        max_cached_images=max(min(_rounded(pictures), _MOST_CACHED_IMAGES), most, 1),
        cuda_graphs=on_cuda and packed.ops is not REFERENCE,
        prompt_graphs=False,
        run_ahead=on_cuda,
    )


def _pages(request: Request) -> int:
    return -(-(len(request.prompt_token_ids) + request.max_tokens) // PAGE_SIZE)


def _rounded(number: int) -> int:
    """Return ``number`` plus at most a quarter, so that a slightly larger call needs no new engine."""
    step = 1 << max(0, number.bit_length() - 3)
    return -(-number // step) * step


_GROWING = ("max_num_seqs", "kv_cache_tokens", "max_cached_images")


def _is_enough(has: EngineConfig, wanted: EngineConfig) -> bool:
    return all(getattr(has, name) >= getattr(wanted, name) for name in _GROWING)


def _larger(has: EngineConfig, wanted: EngineConfig) -> EngineConfig:
    return replace(wanted, **{n: max(getattr(has, n), getattr(wanted, n)) for n in _GROWING})


def _within_memory(
    packed: Idefics2, wanted: EngineConfig, requests: Sequence[Request]
) -> EngineConfig:
    """Return ``wanted`` with a KV cache that fits, which must hold the longest answer."""
    if packed.device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(packed.device)
    # PyTorch keeps what was freed
    free += torch.cuda.memory_reserved(packed.device) - torch.cuda.memory_allocated(packed.device)
    each = bytes_per_token(packed.config.text, packed.dtype) * PAGE_SIZE
    pages = max(int(_SHARE * free) // each, *map(_pages, requests))
    return replace(wanted, kv_cache_tokens=min(wanted.kv_cache_tokens, pages * PAGE_SIZE))
