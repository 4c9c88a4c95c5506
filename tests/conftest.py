"""Where there is no GPU, the same tests run the kernels in Triton's interpreter."""

import os
from pathlib import Path

# Set before anything reads it, and inherited by the processes that tests start: no waiting for a
# network, no thread for every core in workers that share the cores (-n), and the code of this checkout.
os.environ["HF_HUB_OFFLINE"] = "1"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / root) for root in ("engine", "kernels"))

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # triton.jit reads this when it decorates, so it must be set before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    huge = "huge" in config.getoption("-m")
    for item in items:
        if item.get_closest_marker("huge") and not huge:
            item.add_marker(pytest.mark.skip(reason="needs a GPU for itself: -m huge"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
