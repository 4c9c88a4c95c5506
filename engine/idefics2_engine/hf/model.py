"""transformers' Idefics2 on this package's operations."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Self, get_args

from torch import Tensor, nn
from transformers import GenerationMixin

from idefics2_engine.hf.accelerate import patch_blocks
from idefics2_engine.hf.attention import NAME
from idefics2_engine.hf.generation.model_engine import ModelEngine
from idefics2_engine.hf.generation.obstacles import (
    NotOnEngineError,
    check_caller,
    check_model,
)
from idefics2_engine.hf.generation.on_engine import generate_on_engine
from idefics2_engine.hf.operations import Operations
from idefics2_engine.hf.rules import TRAINED, Rules, check_rules, set_perceiver_eps
from idefics2_engine.hf.training import loss
from idefics2_engine.hf.vision_blocks import Idefics2VisionEmbeddings

_log = logging.getLogger(__name__)

Backend = Literal["auto", "engine", "transformers"]

_ALIASES = (None, "flash_attention_2")
# The arguments by which a config is found, among those of ``from_pretrained``
_PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class _Call(NamedTuple):
    """A call of ``generate`` that is running: its arguments, and why it is not for the engine."""

    arguments: Mapping[str, Any]
    obstacle: NotOnEngineError | None


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)


class Idefics2ForConditionalGeneration(  # type: ignore[no-untyped-call]
    loss.Idefics2ForConditionalGeneration
):
    """transformers' class of the same name, computed by this package's operations.

    Parameters, their names, config, inputs, outputs and files are transformers'. These differ:

    - ``attn_implementation`` is ``"idefics2"`` unless given. ``"flash_attention_2"`` is another name
      for it, so that code for flash-attn runs without flash-attn. ``"sdpa"`` and ``"eager"`` are
      transformers'.
    - Norms, MLPs, rotary positions and NF4 products call ``Ops``: ``TRITON`` on CUDA and
      ``REFERENCE`` elsewhere. ``accelerate_model(model, ops)`` sets others.
    - ``generate`` runs on the engine if all that was asked for is what the engine has. The engine
      shares the model's memory. In transformers' loop it makes a ``PagedCache`` unless another
      cache is asked for.
    - A step of training needs no logits (``idefics2_engine.hf.training``).
    - ``rules`` are the trained ones unless given (``idefics2_engine.hf.rules``).

    Attributes:
        generation_backend: Where ``generate`` runs. With ``"engine"``, a call that needs
            transformers' loop is an error that says why.
    """

    def __init__(self, config: Any, *inputs: Any, rules: Rules = TRAINED, **kwargs: Any) -> None:
        parts = {"": config} | {name: getattr(config, name) for name in config.sub_configs}
        config._attn_implementation = _own_name(
            {name: part._attn_implementation for name, part in parts.items()}
        )
        super().__init__(config, *inputs, **kwargs)
        self._generation_backend: Backend = "auto"
        # Whether a rule decides the perceiver's epsilon, because the checkpoint's config has none
        self._lacks_eps = False
        patch_blocks(self, Operations())
        self.rules = check_rules(rules)

    @classmethod
    def from_pretrained(cls, *args: Any, rules: Rules = TRAINED, **kwargs: Any) -> Any:
        """Load as transformers' ``from_pretrained``, with the same arguments.

        Args:
            *args: transformers' arguments.
            rules: What applies where transformers and the trained model differ.
            **kwargs: transformers' arguments.
        """
        check_rules(rules)
        kwargs["attn_implementation"] = _own_name(kwargs.get("attn_implementation"))
        loaded = super().from_pretrained(*args, **kwargs)
        # Quantized layers replace others after __init__
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        patch_blocks(model, Operations())
        model._lacks_eps = _lacks_eps(cls, model, args, kwargs)
        model.rules = rules
        return loaded

    @property
    def rules(self) -> Rules:
        """What applies where transformers and the trained model differ."""
        embeddings = self.model.vision_model.embeddings
        assert isinstance(embeddings, Idefics2VisionEmbeddings)
        return embeddings.rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        self.model.vision_model.embeddings.rules = check_rules(rules)
        if self._lacks_eps:
            config: Any = self.config
            default: float = type(config.perceiver_config)().rms_norm_eps
            trained: float = config.text_config.rms_norm_eps
            set_perceiver_eps(self, trained if rules == TRAINED else default)

    @property
    def generation_backend(self) -> Backend:
        """Where ``generate`` runs: ``"auto"``, ``"engine"`` or ``"transformers"``."""
        return self._generation_backend

    @generation_backend.setter
    def generation_backend(self, backend: Backend) -> None:
        if backend not in get_args(Backend):
            raise ValueError(
                f"generation_backend must be 'auto', 'engine' or 'transformers', got {backend!r}"
            )
        self._generation_backend = backend

    @property
    def engine(self) -> ModelEngine:
        """The engine on the model's own memory; it takes memory of its own on first use."""
        engine: ModelEngine | None = self.__dict__.get("_engine")
        if engine is None:
            engine = self.__dict__["_engine"] = ModelEngine()
        return engine

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Switch the attention as transformers does, with the names of this class."""
        super().set_attn_implementation(_own_name(attn_implementation), *args, **kwargs)

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Generate as transformers' ``generate``, on the engine or in transformers' loop."""
        call = inspect.signature(GenerationMixin.generate).bind_partial(self, *args, **kwargs)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        obstacle = self._obstacle(given)
        if obstacle is not None:
            self._refuse_if_engine(obstacle)
        theirs: Any = super()
        before = _CALL.set(_Call(given, obstacle))
        try:
            return theirs.generate(*args, **kwargs)
        finally:
            _CALL.reset(before)

    def _obstacle(self, given: Mapping[str, Any]) -> NotOnEngineError | None:
        """Return why a call with the arguments ``given`` is not for the engine, if that is known."""
        if self._generation_backend == "transformers":
            return NotOnEngineError("generation_backend is 'transformers'")
        try:
            check_caller(given, self.generation_config)
            check_model(self)
        except NotOnEngineError as error:
            return error
        return None

    def _supports_mm_encoder_outputs(self) -> bool:
        # transformers 5.23 encodes the pictures before its loop. The engine encodes them itself
        call = _CALL.get()
        if call is not None and call.obstacle is None:
            return False
        theirs: Any = super()
        return bool(theirs._supports_mm_encoder_outputs())

    # transformers calls these with all that it has prepared, by the mode of generation

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        theirs: Any = super()
        if call is None or call.obstacle is not None:
            return theirs._sample(*args, **kwargs)
        try:
            return generate_on_engine(self, call.arguments, *args, **kwargs)
        except NotOnEngineError as error:
            self._refuse_if_engine(error)
            _log.info("generate runs in transformers' loop: %s", error)
        return theirs._sample(*args, **kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_engine(NotOnEngineError("num_beams needs transformers' loop"))
        theirs: Any = super()
        return theirs._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_engine(NotOnEngineError("assistant_model needs transformers' loop"))
        theirs: Any = super()
        return theirs._assisted_decoding(*args, **kwargs)

    def _refuse_if_engine(self, reason: NotOnEngineError) -> None:
        if self._generation_backend == "engine":
            raise NotOnEngineError(
                f"generation_backend 'engine' must be asked for what the engine has, but {reason}"
            ) from reason

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Each view would get a memory of its own. They are made anew by the next call that needs them
        self.engine.forget_weights()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _own_name(requested: Any) -> Any:
    """Return ``requested``, or the name of this package's attention if it is an alias of it."""
    if isinstance(requested, dict):
        return {part: _own_name(name) for part, name in requested.items()}
    return NAME if requested in _ALIASES else requested


def _lacks_eps(
    kind: Any, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Return whether the config of a loaded checkpoint says nothing of the perceiver's epsilon."""
    config: Any = model.config
    default = type(config.perceiver_config)().rms_norm_eps
    place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if place is None or config.perceiver_config.rms_norm_eps != default:
        return False
    values, _ = kind.config_class.get_config_dict(
        place, **{name: kwargs[name] for name in _PLACES if name in kwargs}
    )
    return "rms_norm_eps" not in (values.get("perceiver_config") or {})
