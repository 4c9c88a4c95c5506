"""A Ray cluster of two CPUs in this machine, for tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from paths import ROOT

_FOLDERS = ("engine", "kernels", "tests/helpers")


@contextmanager
def local_ray() -> Iterator[None]:
    """Run a cluster, whose processes find this checkout."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in _FOLDERS))
        patch.setenv("OMP_NUM_THREADS", "1")
        # Others would write files into the home directory and ask the network
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            object_store_memory=200 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield
        finally:
            ray.shutdown()
