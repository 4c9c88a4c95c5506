"""Tests of the suite's settings: missing packages of the extras, and the number of threads."""

import os
import subprocess
import sys

import pytest

from idefics2_engine.cpu_threads import SMALL_MODEL_THREADS
from paths import TESTS

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main({arguments!r}))
"""


def collect(missing: list[str], *files: str) -> str:
    """Return pytest's output for collecting ``files`` without the modules ``missing``."""
    arguments = ["--collect-only", "-q", "-rs", *(str(TESTS / file) for file in files)]
    code = WITHOUT.format(missing=missing, arguments=arguments)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_module_without_its_extra_is_skipped_with_the_reason() -> None:
    said = collect(
        ["bitsandbytes"], "kernels/test_nf4.py", "engine/checkpoint/test_quantization.py"
    )
    for name in ("test_nf4.py", "test_quantization.py"):
        assert f"{name} needs bitsandbytes, of the extra 'test'" in said
    assert "error" not in said


def test_module_without_another_import_is_an_error() -> None:
    assert "No module named 'guarded'" in collect(["guarded"], "kernels/test_parity.py")


@pytest.mark.parametrize(("told", "wanted"), [(None, SMALL_MODEL_THREADS), ("2", 2)])
def test_suite_uses_one_thread_by_default(told: str | None, wanted: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": told} if told else {}
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest, torch; print(torch.get_num_threads())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{wanted}\n"
