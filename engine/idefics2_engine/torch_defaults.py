"""The caller's settings of torch do not reach what is built or computed here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run a block, or a decorated function, without the caller's autocast and default device."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    enabled = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    try:
        with torch.device("cpu"):
            yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
