"""The peers of ``idefics2 bench latency``: transformers eager, and compiled with a static cache.

Both use the weights of our model. The classes have the methods of ``latency.Contender``. ``ours``
in their arguments is our contender of the same case.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from idefics2_bench import transformers_peer
from idefics2_bench.model_suite import Loaded
from idefics2_bench.timing import synchronize
from idefics2_bench.workloads import STEPS_IN_A_ROW
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.jobs.plan.latency_case import LatencyCase

COMPILED_PEER = "transformers-compiled"
# This mode uses CUDA graphs, as ``generate`` does
COMPILE_STEP: dict[str, Any] = {"mode": "reduce-overhead"}
# Images need no CUDA graphs, because their launches take little of the time
COMPILE_IMAGES: dict[str, Any] = {}

# cuDNN's attention makes a plan for each new number of keys, which takes 2 ms per layer. On an H100
# with PyTorch 2.11 a decode step of transformers' 8B model takes 74 to 87 ms with cuDNN and 19 to
# 38 ms without. Prompts and images are faster with cuDNN.
WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Static caches have a multiple of this number of keys, which aligns their attention mask
_ALIGNED = 64


def static_cache(peer: Any, num_tokens: int) -> Any:
    """Return an empty KV cache of a fixed size, for at least ``num_tokens`` tokens a sequence.

    It has no sliding layers, because these count tokens in a Python number and a graph would be
    compiled for each value.
    """
    from transformers.cache_utils import Cache, StaticLayer

    keys = -(-num_tokens // _ALIGNED) * _ALIGNED
    layers = peer.config.text_config.num_hidden_layers
    return Cache(layers=[StaticLayer(max_cache_len=keys) for _ in range(layers)])


class MaskedStep:
    """A decode step with a static cache, compiled into one graph.

    ``generate`` does the same with ``cache_implementation="static"``. The attention mask is made
    inside the graph.

    Args:
        peer: transformers' model.
        cache: A ``static_cache``, in which the steps store their keys and values.
        window: Keys that a query attends to. All if ``None``.
    """

    def __init__(self, peer: Any, cache: Any, window: int | None) -> None:
        self.peer = peer
        self.cache = cache
        self.window = window
        self.places = torch.arange(cache.layers[0].max_cache_len, device=peer.device)
        self.compiled = torch.compile(self.logits, fullgraph=True, dynamic=False, **COMPILE_STEP)

    def __call__(self, tokens: Tensor, place: Tensor, padding: Tensor) -> Tensor:
        """Return the logits (B, V) of the next tokens, which the next call overwrites.

        Args:
            tokens: (B, 1) ids.
            place: (1, 1) place of their keys in the cache.
            padding: (B, 1) padding tokens before each sequence.
        """
        torch.compiler.cudagraph_mark_step_begin()
        with sdpa_kernel(WITHOUT_CUDNN):
            logits: Tensor = self.compiled(tokens, place, padding)
        return logits

    def logits(self, tokens: Tensor, place: Tensor, padding: Tensor) -> Tensor:
        """Compute what a call returns."""
        seen = (self.places <= place) & (self.places >= padding)
        if self.window is not None:
            seen = seen & (self.places > place - self.window)
        output = self.peer(
            input_ids=tokens,
            attention_mask=seen[:, None, None],
            position_ids=place - padding,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class EagerTokens:
    """The forward passes of a batch of prompts of equal length, and of later tokens."""

    def __init__(self, case: LatencyCase, llm: Loaded, peer: Any, ours: Any) -> None:
        self.peer = peer
        self.ours = ours
        self.prompts = torch.tensor(ours.prompts, device=llm.model.device)
        self.cache: Any = None

    def new_cache(self) -> Any:
        """Return an empty KV cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.peer.config)

    def prefill(self) -> Tensor:
        """Compute the prompts into a new cache; return their last logits (B, V)."""
        self.cache = self.new_cache()
        return self.forward(self.prompts)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Compute ``input_ids`` (B, S) after the cached tokens; return the last logits (B, V)."""
        output = self.peer(
            input_ids=input_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class EagerPrefill(EagerTokens):
    """A prompt in one forward pass."""

    def first(self) -> Tensor:
        """Compute the prompt; return its last logits (1, V)."""
        return self.prefill()

    def __call__(self) -> None:
        """Compute the prompt again and choose the next token."""
        self.prefill().argmax(-1)


class EagerSteps(EagerTokens):
    """Decode steps."""

    def first(self) -> Tensor:
        """Compute the prompts, then a step on our first tokens; return its logits (B, V)."""
        self.prefill()
        logits = self.forward(self._our_tokens())
        self.tokens = logits.argmax(-1, keepdim=True)
        return logits

    def _our_tokens(self) -> Tensor:
        """Return our first tokens (B, 1)."""
        return torch.tensor(self.ours.first_tokens, device=self.prompts.device)[:, None]

    def __call__(self) -> None:
        """Run the next ``STEPS_IN_A_ROW`` decode steps."""
        with sdpa_kernel(WITHOUT_CUDNN):
            for _ in range(STEPS_IN_A_ROW):
                self.tokens = self.forward(self.tokens).argmax(-1, keepdim=True)


class EagerImages:
    """All images in one pass, padded to the largest height and width."""

    def __init__(self, case: LatencyCase, llm: Loaded, peer: Any, ours: Any) -> None:
        self.peer = peer
        model, config = llm.model, llm.processor.image_config
        rows = [[tile] for tile in ours.tiles]
        self.inputs = transformers_peer.padded_images(rows, config, model.device, model.dtype)

    def first(self) -> Tensor:
        """Return the embeddings of all images (rows, values).

        The model returns one tensor for all images, or one for each image.
        """
        encoded = self()
        if isinstance(encoded, Tensor):
            return encoded.flatten(0, -2)
        return torch.cat([each.flatten(0, -2) for each in encoded])

    def __call__(self) -> Tensor | list[Tensor]:
        """Encode the images."""
        encoded: Tensor | list[Tensor] = self.peer.get_image_features(**self.inputs).pooler_output
        return encoded


class CompiledSteps(EagerSteps):
    """Decode steps with a static cache, compiled; the prompts are computed eagerly.

    Attributes:
        facts: Values for the row: ``compile_seconds``, the time of the first steps with compilation
            and capture, and ``cuda_graph_skips``, how often Inductor captured no CUDA graph.
    """

    def __init__(self, case: LatencyCase, llm: Loaded, peer: Any, ours: Any) -> None:
        super().__init__(case, llm, peer, ours)
        # ``first`` runs ``STEPS_IN_A_ROW`` more steps
        self.num_tokens = case.length + ours.new_tokens + STEPS_IN_A_ROW
        self.window = llm.config.text.sliding_window
        self.padding = torch.zeros(len(self.prompts), 1, dtype=torch.int64, device=peer.device)
        self.facts: dict[str, float] = {}

    def new_cache(self) -> Any:
        """Return an empty KV cache for ``num_tokens`` tokens."""
        return static_cache(self.peer, self.num_tokens)

    def first(self) -> Tensor:
        """Compute the prompts and a step on our first tokens, and return its logits (B, V).

        The first steps compile and capture the graph.
        """
        with no_grad():
            self.prefill()
            self.step = MaskedStep(self.peer, self.cache, self.window)
            tokens = self._our_tokens()
            self.position = torch.full((1, 1), self.prompts.shape[1], device=tokens.device)
            begin, skips = time.perf_counter(), cuda_graph_skips()
            # The next step writes its logits to the same memory
            logits = self._next(tokens).clone()
            self()
            synchronize(tokens.device)
            self.facts["compile_seconds"] = time.perf_counter() - begin
            self.facts["cuda_graph_skips"] = cuda_graph_skips() - skips
            return logits

    def __call__(self) -> None:
        """Run the next ``STEPS_IN_A_ROW`` decode steps."""
        with no_grad():
            for _ in range(STEPS_IN_A_ROW):
                self._next(self.tokens)

    def _next(self, tokens: Tensor) -> Tensor:
        logits = self.step(tokens, self.position, self.padding)
        self.tokens = logits.argmax(-1, keepdim=True)
        self.position += 1
        return logits


class CompiledImages(EagerImages):
    """All images in one pass through a compiled vision tower and connector.

    Attributes:
        facts: A value for the row: ``compile_seconds``, the time of the first pass with
            compilation.
    """

    def __init__(self, case: LatencyCase, llm: Loaded, peer: Any, ours: Any) -> None:
        super().__init__(case, llm, peer, ours)
        for part in (peer.model.vision_model, peer.model.connector):
            part.compile(fullgraph=True, dynamic=False, **COMPILE_IMAGES)
        self.facts: dict[str, float] = {}

    def first(self) -> Tensor:
        """Compile the model and return the embeddings of all images (rows, values)."""
        begin = time.perf_counter()
        found = super().first()
        synchronize(found.device)
        self.facts["compile_seconds"] = time.perf_counter() - begin
        return found

    def __call__(self) -> Tensor | list[Tensor]:
        """Encode the images."""
        with no_grad():
            return super().__call__()


@contextmanager
def no_grad() -> Iterator[None]:
    """Leave inference mode, in which fewer programs compile, and compute without gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def cuda_graph_skips() -> int:
    """Return how often Inductor captured no CUDA graph, for which it raises no error."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


CONTENDERS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    PEER: {"step": EagerSteps, "prefill": EagerPrefill, "image": EagerImages},
    COMPILED_PEER: {"step": CompiledSteps, "image": CompiledImages},
}
"""The contender of each peer, by the peer's name and the kind of case."""
