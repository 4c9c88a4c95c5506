"""Comparison of two ways to compute the same answers, stage by stage.

A path is an implementation of the model: the engine's, transformers', float64, or a recording on
disk. ``compare`` runs two paths on the same inputs and says at which stage they first part beyond
rounding. transformers is imported only when a path asks for it.
"""

import importlib

# Type checkers treat this name like typing.TYPE_CHECKING. Defining it avoids importing typing
TYPE_CHECKING = False
if TYPE_CHECKING:
    from idefics2_engine.parity.comparison import compare
    from idefics2_engine.parity.golden.golden_check import check_golden
    from idefics2_engine.parity.inputs import Case
    from idefics2_engine.parity.page.report import write_heat_maps, write_report
    from idefics2_engine.parity.paths import Path
    from idefics2_engine.parity.result import Comparison

__all__ = [
    "Case",
    "Comparison",
    "Path",
    "check_golden",
    "compare",
    "write_heat_maps",
    "write_report",
]

_HOMES = {
    "Case": "inputs",
    "Comparison": "result",
    "Path": "paths",
    "check_golden": "golden.golden_check",
    "compare": "comparison",
    "write_heat_maps": "page.report",
    "write_report": "page.report",
}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
