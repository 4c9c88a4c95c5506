"""``idefics2 bench kernels --mine``: a user's function is checked, and timed if it is right."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from idefics2_bench import kernels
from idefics2_bench.own_kernel import check, load_function, with_mine
from idefics2_bench.timing import Time
from idefics2_engine.cli.command import run
from idefics2_engine.errors import Idefics2Error
from idefics2_kernels import REFERENCE
from idefics2_kernels.catalog import CATALOG, KernelSpec
from paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and forget its modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def rms_norm_spec(function: Callable[..., Any]) -> KernelSpec:
    return with_mine("rms_norm", function)


def verdicts(function: Callable[..., Any]) -> dict[str, int]:
    spec = rms_norm_spec(function)
    found = [one.verdict for one in check(spec, [c for c in spec.cases if c.where == "any"], CPU)]
    return {verdict: found.count(verdict) for verdict in found}


def write_module(text: str) -> None:
    Path("my_kernels.py").write_text(
        "import torch\nfrom idefics2_kernels import REFERENCE\n\n\n"
        f"def rms_norm(x, weight, eps):\n    {text}\n"
    )


ALL = len([c for s in CATALOG if s.name == "rms_norm" for c in s.cases if c.where == "any"])
RIGHT = "return REFERENCE.rms_norm(x, weight, eps)"


def test_right_function_is_right_in_all_cases() -> None:
    assert ALL > 10
    assert verdicts(REFERENCE.rms_norm) == {"right": ALL}


def test_a_small_error_is_wrong() -> None:
    def off(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return REFERENCE.rms_norm(x, weight, eps) * 1.03

    # Cases without rows have nothing that could be wrong
    assert verdicts(off)["wrong"] > 0.7 * ALL


def test_raising_is_unsupported_or_failed() -> None:
    def picky(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype is torch.float32:
            raise NotImplementedError("fp32")
        if x.dtype is torch.bfloat16:
            raise KeyError("a bug")
        return REFERENCE.rms_norm(x, weight, eps)

    found = verdicts(picky)
    assert set(found) == {"right", "unsupported", "failed"}
    assert sum(found.values()) == ALL


@pytest.mark.skipif(torch.cuda.is_available(), reason="times kernels on a GPU")
def test_the_first_failure_is_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    write_module("raise KeyError('a bug')")
    assert run(["bench", "kernels", "--mine", "my_kernels:rms_norm", "--kernel", "rms_norm"]) == 1
    err = capsys.readouterr().err
    assert err.count("raise KeyError('a bug')") == 1
    assert "Triton kernels run with TRITON_INTERPRET=1" in err


@pytest.mark.parametrize("name", ["my_kernels:rms_norm", "my_kernels.py:rms_norm"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="times kernels on a GPU")
def test_command_checks_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_module(RIGHT)
    assert run(["bench", "kernels", "--mine", name, "--kernel", "rms_norm"]) == 0
    out, err = capsys.readouterr()
    count = re.search(r"(\d+) right of (\d+) cases of rms_norm", out)
    assert count is not None
    assert count[1] == count[2]
    assert "not timed: needs a CUDA device" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="times kernels on a GPU")
def test_wrong_function_gives_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    write_module("return torch.zeros_like(x)")
    assert run(["bench", "kernels", "--mine", "my_kernels:rms_norm", "--kernel", "rms_norm"]) == 1
    assert "times the allowed error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mine", "my_kernels"], "must be MODULE:FUNCTION or FILE.py:FUNCTION, got 'my_kernels'"),
        (["--mine", "none_such:f"], "none_such cannot be imported: ModuleNotFoundError"),
        (["--mine", "none.py:f"], "none.py cannot be imported: FileNotFoundError"),
        (["--mine", "my_kernels:f"], "my_kernels must have a function 'f', got none"),
        (["--mine", "broken:f"], "broken cannot be imported: SyntaxError"),
    ],
)
def test_function_that_cannot_be_found_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(RIGHT)
    Path("broken.py").write_text("def f(:\n")
    assert run(["bench", "kernels", "--kernel", "rms_norm", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--mine needs the operation that it computes: one --kernel"),
        (["--kernel", "norm"], "--kernel must be one of flash_attention"),
        (
            ["--kernel", "rms_norm", "--case", "none"],
            "--case: 'none' of rms_norm cannot be checked here",
        ),
    ],
)
def test_operation_must_be_one_of_the_catalog(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(RIGHT)
    assert run(["bench", "kernels", "--mine", "my_kernels:rms_norm", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_function_is_timed_beside_ours_and_the_peers(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def fake_measure(calls: dict[str, list[Callable[[], object]]]) -> dict[str, Time]:
        return {name: Time(*([1.0 if name == "mine" else 2.0] * 3)) for name in calls}

    monkeypatch.setattr(kernels, "measure", fake_measure)
    spec = rms_norm_spec(REFERENCE.rms_norm)
    case = next(c for c in spec.cases if c.dtype is torch.float32 and spec.cost(c).bytes > 1000)
    about: dict[str, object] = {"copy_TBps": 3.0, "matmul_TFLOPs": 700.0}
    rows = kernels.bench_case(spec, ["mine", "triton"], case, about, device, copies=1)
    assert [row["impl"] for row in rows] == ["mine", "triton", "torch"]
    assert rows[0]["speedup"] == 2.0


def test_module_is_imported_from_the_current_folder() -> None:
    write_module(RIGHT)
    assert load_function("my_kernels:rms_norm").__module__ == "my_kernels"
    with pytest.raises(Idefics2Error, match="must have a function '__name__'"):
        load_function("my_kernels:__name__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_documented_kernel_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/own-kernel.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("my_attention.py").write_text(code)
    cases = ("window-17", "head-dim-8", "empty", "sliced", "scale-and-slack")
    options = [option for case in cases for option in ("--case", case)]
    joined = page.replace("\\\n", "")
    (command,) = re.findall(r"^\$ TRITON_INTERPRET=1 idefics2 (.+)$", joined, re.MULTILINE)
    assert run([*command.split(), *options]) == 0
    assert f"{len(cases)} right of {len(cases)} cases" in capsys.readouterr().out
