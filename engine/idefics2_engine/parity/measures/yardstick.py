"""The leg with which two sides of different dtypes are compared."""

import pathlib
from collections.abc import Sequence

import torch

from idefics2_engine.parity.inputs import Case
from idefics2_engine.parity.measures.measure import Legs
from idefics2_engine.parity.recording.dump import Recording
from idefics2_engine.parity.recording.record import record_reference


def epsilon(dtype: str) -> float:
    """Return the distance from 1 to the next number of the dtype of this name."""
    return torch.finfo(getattr(torch, dtype)).eps


def with_yardstick(
    legs: Legs,
    inputs: Sequence[Case],
    answers: Recording,
    folder: pathlib.Path,
    scratch: pathlib.Path,
    device: str,
) -> Legs:
    """Return ``legs`` with what two sides of different dtypes are compared with."""
    a, b, exact = legs.a, legs.b, legs.exact
    if exact is None or (a.dtype, a.nf4) == (b.dtype, b.nf4):
        return legs
    narrow = max((leg for leg in (a, b) if leg is not exact), key=lambda leg: epsilon(leg.dtype))
    if exact in (a, b) and _is_reference(narrow):
        # The reference cannot be its own yardstick
        return Legs(a, b)
    yardstick = record_reference(
        narrow, scratch / "yardstick", inputs, answers, folder, device=device, in_float64=False
    )
    return Legs(a, b, exact, yardstick)


def _is_reference(recording: Recording) -> bool:
    kind, *parts = recording.path.split(":")
    is_default = not {"triton", "reference", "deterministic"}.intersection(parts)
    is_named = "reference" in parts or (is_default and recording.about["device"] == "cpu")
    return kind == "ours" and is_named and not recording.about.get("replaced")
