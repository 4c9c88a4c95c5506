"""Idefics2: a processor, a model, an engine and a command line.

Importing this package does not import torch; the first use of ``LLM`` does. The logger
``idefics2_engine`` is silent unless the importing program gives it a handler or a level.
"""

import importlib
import logging

# Type checkers treat this name like typing.TYPE_CHECKING. Defining it avoids importing typing
TYPE_CHECKING = False
if TYPE_CHECKING:
    from idefics2_engine.llm import LLM
    from idefics2_engine.row import Row
    from idefics2_engine.sampling_params import SamplingParams
    from idefics2_engine.structured.params import StructuredOutputsParams

__version__ = "0.1.0"
# Without a handler, Python would print warnings to standard error
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = ["LLM", "Row", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "llm",
    "Row": "row",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "structured.params",
}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
