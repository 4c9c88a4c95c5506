"""The model of ``idefics2_engine.hf`` and transformers' own, on the weights of one model."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics2_bench import model_suite, transformers_peer
from idefics2_bench.hf.cases import Texts
from idefics2_engine.hf.shared_weights import model_on
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_kernels import REFERENCE, TRITON

# The tokenizer's control tokens are the first and the last ids
_FIRST_TEXT, _LAST_TEXT = 5, 30000


@dataclass(frozen=True)
class Models:
    """Both models of a run.

    Attributes:
        packed: The engine's model, which has the weights.
        own: The class of ``idefics2_engine.hf`` on them.
        peer: transformers' class on them.
        folder: The folder of the model's files.
    """

    packed: Idefics2
    own: Any
    peer: Any
    folder: Path

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Models":
        """Build the model of ``options``, and both classes on it."""
        ops = TRITON if options.ops == "triton" else REFERENCE
        packed = model_suite.load_network(options, ops)
        return cls.on(packed, model_suite.folder(options))

    @classmethod
    def on(cls, packed: Idefics2, folder: Path) -> "Models":
        """Build both classes on the weights of ``packed``."""
        from idefics2_engine.hf import Idefics2ForConditionalGeneration, accelerate_model

        config = transformers_peer.transformers_config(packed, folder)
        own = model_on(packed, Idefics2ForConditionalGeneration, config, dtype=packed.dtype)
        accelerate_model(own, packed.ops)
        # Both sides follow one rule, so that their results can be compared
        own.rules = "transformers"
        peer = transformers_peer.transformers_model(packed, folder)
        for model in (own, peer):
            # Every answer has all its tokens
            model.generation_config = _greedy()
        return cls(packed, own, peer, folder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.packed.device

    def prompts(self, texts: Texts) -> Tensor:
        """Draw the ids (B, S) of ``texts``."""
        generator = torch.Generator().manual_seed(0)
        last = min(_LAST_TEXT, self.packed.config.text.vocab_size)
        shape = texts.count, texts.length
        ids = torch.randint(_FIRST_TEXT, last, shape, generator=generator)
        return ids.to(self.device)


def _greedy() -> Any:
    import transformers

    library: Any = transformers
    return library.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
