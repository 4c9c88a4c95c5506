"""transformers' side of ``idefics2 bench latency``: as it is, and compiled with a static cache.

Both run on the weights of our model. ``first`` gets ready and returns a result to compare; a call does what is timed.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from idefics2_bench import transformers_peer
from idefics2_bench.model_suite import PEER
from idefics2_bench.timing import synchronize
from idefics2_bench.workloads import STEPS_IN_A_ROW, LatencyCase
from idefics2_engine import LLM

COMPILED_PEER = "transformers-compiled"
COMPILE_STEP: dict[str, Any] = {"mode": "reduce-overhead"}  # with CUDA graphs, as in `generate`
COMPILE_IMAGES: dict[str, Any] = {}  # launches do not count there

# For each new number of keys cuDNN's attention makes a plan, 2 ms a layer: a decode step of transformers' 8B model takes 74
# to 87 ms with it, 19 to 38 without (H100, PyTorch 2.11). Prompts and images are faster with it.
_WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Static caches have a multiple of this number of keys, which aligns their attention mask
_ALIGNED = 64


class EagerTokens:
    """A forward pass of a batch of prompts, and of one more token each."""

    def __init__(self, case: LatencyCase, llm: LLM, peer: Any, ours: Any) -> None:
        self.peer = peer
        self.ours = ours
        self.prompts = torch.tensor(ours.prompts, device=llm.model.device)
        self.cache: Any = None

    def new_cache(self) -> Any:
        """Return an empty KV cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.peer.config)

    def prefill(self) -> Tensor:
        """Compute the prompts into a new cache; return the logits behind them (B, V)."""
        self.cache = self.new_cache()
        return self.forward(self.prompts)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Compute ``input_ids`` (B, S) behind the cached ones; return the last logits (B, V)."""
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
        """Compute the prompt."""
        return self.prefill()

    def __call__(self) -> None:
        """Compute it again."""
        self.prefill().argmax(-1)


class EagerSteps(EagerTokens):
    """Decode steps."""

    def first(self) -> Tensor:
        """Compute the prompts and a step, from our tokens."""
        self.prefill()
        logits = self.forward(self._our_tokens())
        self.tokens = logits.argmax(-1, keepdim=True)
        return logits

    def _our_tokens(self) -> Tensor:
        """Return our first tokens (B, 1)."""
        return torch.tensor(self.ours.first_tokens, device=self.prompts.device)[:, None]

    def __call__(self) -> None:
        """Run the next steps."""
        with sdpa_kernel(_WITHOUT_CUDNN):
            for _ in range(STEPS_IN_A_ROW):
                self.tokens = self.forward(self.tokens).argmax(-1, keepdim=True)


class EagerImages:
    """All images in one pass, padded to the largest."""

    def __init__(self, case: LatencyCase, llm: LLM, peer: Any, ours: Any) -> None:
        self.peer = peer
        model, config = llm.model, llm.processor.image_config
        rows = [[tile] for tile in ours.tiles]
        self.inputs = transformers_peer.padded_images(rows, config, model.device, model.dtype)

    def first(self) -> Tensor:
        """Return the embeddings, row by row, from a tensor for each image or one for all."""
        encoded = self()
        if isinstance(encoded, Tensor):
            return encoded.flatten(0, -2)
        return torch.cat([each.flatten(0, -2) for each in encoded])

    def __call__(self) -> Tensor | list[Tensor]:
        """Encode."""
        encoded: Tensor | list[Tensor] = self.peer.get_image_features(**self.inputs).pooler_output
        return encoded


class CompiledSteps(EagerSteps):
    """Decode steps with a static cache, compiled into one graph; the prompts are computed eagerly.

    This is what ``generate`` does with ``cache_implementation="static"``. The attention mask is made inside the graph. The
    cache has no sliding layers: these count tokens in a Python number, and the graph would be compiled for each value.

    Attributes:
        facts: For the row: the seconds that the first steps took, in which the graph is compiled and captured, and how often
            that was not captured as a CUDA graph.
    """

    def __init__(self, case: LatencyCase, llm: LLM, peer: Any, ours: Any) -> None:
        super().__init__(case, llm, peer, ours)
        tokens = case.length + ours.new_tokens + STEPS_IN_A_ROW  # which ``first`` takes as well
        self.num_keys = -(-tokens // _ALIGNED) * _ALIGNED
        self.window = llm.config.text.sliding_window
        self.places = torch.arange(self.num_keys, device=self.prompts.device)
        self.step = torch.compile(self.masked_step, fullgraph=True, dynamic=False, **COMPILE_STEP)
        self.facts: dict[str, float] = {}

    def new_cache(self) -> Any:
        """Return an empty KV cache of a fixed size."""
        from transformers.cache_utils import Cache, StaticLayer

        layers = self.peer.config.text_config.num_hidden_layers
        return Cache(layers=[StaticLayer(max_cache_len=self.num_keys) for _ in range(layers)])

    def masked_step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Compute ``tokens`` (B, 1), all at ``position`` (1, 1); return the logits (B, V)."""
        seen = self.places <= position
        if self.window is not None:
            seen = seen & (self.places > position - self.window)
        mask = seen[None, None].expand(len(tokens), 1, 1, self.num_keys)
        return self.forward(tokens, attention_mask=mask, position_ids=position)

    def first(self) -> Tensor:
        """Compute the prompts and a step, from our tokens, then compile and capture the graph."""
        with _no_grad():
            self.prefill()
            tokens = self._our_tokens()
            self.position = torch.full((1, 1), self.prompts.shape[1], device=tokens.device)
            begin, skips = time.perf_counter(), _cuda_graph_skips()
            logits = self._next(tokens).clone()  # the next step writes into the same memory
            self()
            synchronize(tokens.device)
            self.facts["compile_seconds"] = time.perf_counter() - begin
            self.facts["cuda_graph_skips"] = _cuda_graph_skips() - skips
            return logits

    def __call__(self) -> None:
        """Run the next steps."""
        with _no_grad():
            for _ in range(STEPS_IN_A_ROW):
                self._next(self.tokens)

    def _next(self, tokens: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with sdpa_kernel(_WITHOUT_CUDNN):
            logits: Tensor = self.step(tokens, self.position)
        self.tokens = logits.argmax(-1, keepdim=True)
        self.position += 1
        return logits


class CompiledImages(EagerImages):
    """All images in one pass through a compiled vision tower and connector.

    Attributes:
        facts: For the row: the seconds that the first pass took.
    """

    def __init__(self, case: LatencyCase, llm: LLM, peer: Any, ours: Any) -> None:
        super().__init__(case, llm, peer, ours)
        for part in (peer.model.vision_model, peer.model.connector):
            part.compile(fullgraph=True, dynamic=False, **COMPILE_IMAGES)
        self.facts: dict[str, float] = {}

    def first(self) -> Tensor:
        """Compile; return the embeddings, row by row."""
        begin = time.perf_counter()
        found = super().first()
        synchronize(found.device)
        self.facts["compile_seconds"] = time.perf_counter() - begin
        return found

    def __call__(self) -> Tensor | list[Tensor]:
        """Encode."""
        with _no_grad():
            return super().__call__()


@contextmanager
def _no_grad() -> Iterator[None]:
    """Compute without gradients, and without inference mode, in which fewer programs compile."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _cuda_graph_skips() -> int:
    """Return how often Inductor gave up capturing a CUDA graph, which is no error to it."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


CONTENDERS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    PEER: {"step": EagerSteps, "prefill": EagerPrefill, "image": EagerImages},
    COMPILED_PEER: {"step": CompiledSteps, "image": CompiledImages},
}
"""What computes each kind of case, by the peer's name."""
