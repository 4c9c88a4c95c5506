"""Idefics2: a processor, a model, an engine and a command line.

Importing this package costs little: torch is loaded by the first name that needs it. The logger ``idefics2_engine`` is
silent unless the program that imports this gives it a handler or a level.
"""

import importlib
import logging

TYPE_CHECKING = False  # as typing's, without importing that
if TYPE_CHECKING:
    from idefics2_engine.llm import LLM
    from idefics2_engine.sampling_params import SamplingParams

__version__ = "0.1.0"
# Without a handler Python would print warnings to standard error
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "llm", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> object:
    """Import the module that ``name`` lives in, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
