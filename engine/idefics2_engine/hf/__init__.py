"""transformers' Idefics2 with this package's operations, and the model with transformers' inputs.

In: transformers' classes, or padded ids, masks, pixels and labels. Out: transformers' outputs, or
logits and the loss. ``model`` has the class and ``accelerate`` the function that patches a loaded
model. ``attention`` and ``blocks`` are what is patched, and ``padded_forward`` is the packed model
on padded inputs. ``generation`` runs ``generate`` on the engine, and ``shared_weights`` gives both
one memory. In transformers' loop, ``paged_cache`` is the cache of ``generate``, and ``decode_graph``
makes graphs of its steps. ``training`` has the loss without logits and what checkpoints keep. All but
``padded_forward`` need transformers, so their names are imported on first use.
Must not import ``llm``.
"""

import importlib
from importlib.metadata import version
from importlib.util import find_spec

from idefics2_engine.errors import install_extras

# Type checkers treat this name like typing.TYPE_CHECKING. Defining it avoids importing typing
TYPE_CHECKING = False
if TYPE_CHECKING:
    from idefics2_engine.hf.accelerate import accelerate_model
    from idefics2_engine.hf.image_processor import Idefics2ImageProcessor
    from idefics2_engine.hf.model import Idefics2ForConditionalGeneration
    from idefics2_engine.hf.processor import Idefics2Processor
    from idefics2_engine.hf.training.finite_gradients import FiniteGradients

__all__ = [
    "FiniteGradients",
    "Idefics2ForConditionalGeneration",
    "Idefics2ImageProcessor",
    "Idefics2Processor",
    "accelerate_model",
]

_HOMES = {
    "FiniteGradients": "training.finite_gradients",
    "Idefics2ForConditionalGeneration": "model",
    "Idefics2ImageProcessor": "image_processor",
    "Idefics2Processor": "processor",
    "accelerate_model": "accelerate",
}
# The oldest release of transformers for which the tests pass
_OLDEST = (5, 17)


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("transformers") is None:
        raise ImportError(
            f"{__name__}.{name} needs transformers, got none: " + install_extras("transformers")
        )
    installed = version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ImportError(
            f"{__name__}.{name} needs transformers {oldest} or newer, got {installed}: "
            + install_extras("transformers")
        )
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
