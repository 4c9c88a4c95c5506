"""How many threads a CPU computes with, in the processes of the command line and the tests."""

import os
from pathlib import Path

from idefics2_engine.checkpoint.shards import weight_paths

SMALL_MODEL_THREADS = 1
"""Of a model such as the demo. Its operations are so short that threads mostly wait for each other, and beside
other work, where one of them has no core, they wait for long."""

_SMALL_BYTES = 1 << 28  # of weights


def set_cpu_threads(folder: Path, threads: int | None) -> None:
    """Set torch's number of threads for the model in ``folder``, in the whole process.

    That is ``threads``, or if ``None`` what ``OMP_NUM_THREADS`` says, or one for a small model, or
    torch's own choice. Threads that have computed already keep their number, so it is set before a
    model is loaded.
    """
    import torch

    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        size = sum(path.stat().st_size for path in weight_paths(folder))
        threads = SMALL_MODEL_THREADS if size < _SMALL_BYTES else None
    if threads is not None:
        torch.set_num_threads(threads)
