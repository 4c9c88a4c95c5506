"""Settings for the whole suite; without a GPU the tests run the kernels in Triton's interpreter."""

import os
import signal
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from idefics2_engine.cpu_threads import SMALL_MODEL_THREADS

# These are set before anything reads them, and processes that tests start inherit them. No test
# waits for a network. The number of threads suits the small models. Modules are imported from this
# checkout.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(SMALL_MODEL_THREADS))
ROOT = Path(__file__).parents[1]
_GIVEN_PATH = os.environ.get("PYTHONPATH", "")
os.environ["PYTHONPATH"] = os.pathsep.join(
    # Packages in older versions are on the path in CI
    filter(None, [*(str(ROOT / root) for root in ("engine", "kernels", "bench")), _GIVEN_PATH])
)

# A script's background processes ignore it, and those that tests start would too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # triton.jit reads this when it decorates, so it must be set before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPTIONAL = {
    Requirement(one).name.replace("-", "_"): extra for extra, ones in EXTRAS.items() for one in ones
}


class _Module(pytest.Module):
    """A test module that is skipped if it needs a missing package of the extras."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError):
                package = str(missing.name).partition(".")[0]
                if package in OPTIONAL:
                    pytest.skip(
                        f"{self.path.name} needs {package}, of the extra {OPTIONAL[package]!r}"
                    )
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _Module.from_parent(parent, path=module_path)
    return module


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _tokenizers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Load equal tokenizers once in tests that load models, except in those of tokenizers."""
    parts = request.path.relative_to(ROOT / "tests").parts
    # Kernels are tested where this package is missing
    if (
        parts[0] in ("engine", "bench", "demo", "docs")
        and "prompts" not in parts
        and find_spec("tokenizers")
    ):
        from tokenizer_cache import tokenizers_loaded_once

        with tokenizers_loaded_once():
            yield
    else:
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    huge = "huge" in config.getoption("-m")
    for item in items:
        if item.get_closest_marker("huge") and not huge:
            item.add_marker(pytest.mark.skip(reason="needs a GPU for itself: -m huge"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    # Tests that need no kernel need not load Triton
    if not HAS_GPU and "triton.runtime.interpreter" in sys.modules:
        from quick_interpreter import make_quick

        make_quick()
