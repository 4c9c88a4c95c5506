"""Number of CPU threads of torch, for the command line and the tests."""

import os
from pathlib import Path

from idefics2_engine.checkpoint.shards import weight_paths

SMALL_MODEL_THREADS = 1
"""Threads for a model as small as the demo.

Its operations are so short that several threads would mostly wait for each other.
"""

# A model with fewer bytes of weights is small
_SMALL_BYTES = 1 << 28


def set_cpu_threads(folder: Path, threads: int | None) -> None:
    """Set torch's number of threads in this process for the model in ``folder``.

    If ``threads`` is ``None``, ``OMP_NUM_THREADS`` has precedence, then one thread for a small
    model, then torch's default. The call must precede loading, because the number cannot change
    after the first computation.
    """
    import torch

    if threads is None and "OMP_NUM_THREADS" not in os.environ and _is_small(folder):
        threads = SMALL_MODEL_THREADS
    if threads is not None:
        torch.set_num_threads(threads)


def share_cpu_threads(folder: Path, threads: int) -> None:
    """Set torch's number of threads for a process whose share of the cores is ``threads``.

    A small model gets one thread, as it does without other processes.
    """
    set_cpu_threads(folder, min(threads, SMALL_MODEL_THREADS) if _is_small(folder) else threads)


def _is_small(folder: Path) -> bool:
    return sum(path.stat().st_size for path in weight_paths(folder)) < _SMALL_BYTES
