"""What is in the distribution, what may import what, and that the tested versions are complete."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import ClassVar

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import idefics2_engine
import report
from idefics2_kernels.catalog import CATALOG

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted(
    file
    for package in ("engine/idefics2_engine", "kernels/idefics2_kernels")
    for file in (ROOT / package).rglob("*.py")
)
# The host's side of the engine: tested in milliseconds, because nothing here waits for torch.
HOST_ONLY = {
    "adapter_config",
    "config",
    "cpu_threads",
    "demo",
    "errors",
    "field_checks",
    "hub",
    "json_file",
    "pages",
    "quantization",
    "safetensors_file",
    "sampling_params",
    "scheduler",
    "sequence",
    "verify",
    "weight_files",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Every module that ``file`` imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_roots_are_no_packages() -> None:
    # With an __init__.py, `engine` and `kernels` would be packages for whoever has the checkout on
    # the path, and `kernels` would hide Hugging Face's package of that name from transformers.
    for root in ("engine", "kernels"):
        assert (ROOT / root).is_dir()
        assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("name", [module_name(file) for file in FILES])
def test_every_module_imports_without_a_gpu(name: str) -> None:
    importlib.import_module(name)


def test_kernels_do_not_know_the_engine() -> None:
    for file in FILES:
        if file.is_relative_to(ROOT / "kernels"):
            assert not [name for name in imports(file) if name.startswith("idefics2_engine")], file


def test_the_reference_imports_no_triton() -> None:
    found = [name.split(".")[0] for name in imports(ROOT / "kernels/idefics2_kernels/reference.py")]
    assert "torch" in found
    assert "triton" not in found


@pytest.mark.parametrize(
    "name",
    ["idefics2_engine", *(module_name(file) for file in FILES if file.stem in HOST_ONLY)],
)
def test_the_host_side_imports_no_torch(name: str) -> None:
    check = f"import sys, {name}; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_wheel(tmp_path: Path) -> None:
    builder = WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(
            f"idefics2_engine-{idefics2_engine.__version__}.dist-info/METADATA"
        ).decode()
    code = {str(file.relative_to(ROOT)).partition("/")[2] for file in FILES}
    scripts = {file.name for file in (ROOT / "bench").glob("*.py") if "test" not in file.name}
    assert "micro.py" in scripts
    code |= {f"idefics2_engine/bench/{script}" for script in scripts}
    assert {name for name in names if name.endswith(".py")} == code
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "idefics2_engine",
        "idefics2_kernels",
    }
    assert {"idefics2_engine/py.typed", "idefics2_kernels/py.typed"} <= names
    for folder, inside in (("demo", "demo"), ("images", "demo_images")):
        files = {p.name for p in (ROOT / "examples" / folder).iterdir()}
        assert files
        assert files == {Path(n).name for n in names if n.startswith(f"idefics2_engine/{inside}/")}
    assert f"\nVersion: {idefics2_engine.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_the_kernels_pages_have_the_tables_of_catalog_and_results() -> None:
    pages = report.renewed_pages()
    assert set(pages) == set((ROOT / "docs/kernels").glob("*.md"))
    for path, renewed in pages.items():
        assert path.read_text(encoding="utf-8") == renewed, f"{path}: run bench/report.py"


@pytest.mark.parametrize("name", [spec.name for spec in CATALOG])
def test_every_operation_has_a_page_with_its_figures(name: str) -> None:
    page = (ROOT / f"docs/kernels/{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert page.count("<!-- figures: ") == page.count(f"<!-- figures: {name} -->\n") == 1
    assert "\n| case | implementation |" in page
    for heading in ("What it computes", "How the work is divided", "Why it is launched so"):
        assert page.count(f"\n## {heading}\n") == 1
    index = (ROOT / "docs/kernels/README.md").read_text(encoding="utf-8")
    assert f"\n| [`{name}`]({name}.md) |" in index


def test_version_is_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "engine/idefics2_engine/__init__.py"


class TestConstraints:
    """``constraints.txt`` fixes every package that an installation for development brings."""

    PINS: ClassVar[dict[str, str]] = dict(
        re.findall(r"^([^#=\s]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )

    def requirements(self) -> Iterator[Requirement]:
        """Ours, and theirs in turn, as far as they hold on this machine."""
        project = PROJECT["project"]
        ours = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
        for extra in project["optional-dependencies"].values():
            ours += [r for r in extra if not r.startswith(project["name"])]
        todo = [Requirement(r) for r in ours]
        seen = set()
        while todo:
            requirement = todo.pop()
            if str(requirement) in seen:
                continue
            seen.add(str(requirement))
            yield requirement
            try:
                below = requires(requirement.name) or []
            except PackageNotFoundError:
                continue  # not in this environment, so neither is what it needs
            extras = requirement.extras or {""}
            todo += [
                r
                for r in map(Requirement, below)
                if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
            ]

    def test_complete(self) -> None:
        pinned_by_torch = ("nvidia-", "cuda-")
        for requirement in self.requirements():
            name = canonicalize_name(requirement.name)
            if not name.startswith(pinned_by_torch):
                assert name in self.PINS
                assert requirement.specifier.contains(self.PINS[name]), str(requirement)

    def test_tested_torch_and_triton(self) -> None:
        assert self.PINS["torch"] == "2.13.0"
        assert self.PINS["triton"] == "3.7.1"  # the one that torch 2.13.0 asks for

    def test_no_local_versions(self) -> None:
        # 2.13.0+cpu is on no index but PyTorch's own
        assert all(re.fullmatch(r"[0-9.]+", version) for version in self.PINS.values())
