"""Tests of the distribution's contents, and of the completeness of the pinned versions."""

import re
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
from idefics2_kernels.catalog import CATALOG
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted(
    file
    for package in ("engine/idefics2_engine", "kernels/idefics2_kernels", "bench/idefics2_bench")
    for file in (ROOT / package).rglob("*.py")
)


def test_wheel(tmp_path: Path) -> None:
    builder = WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(
            f"idefics2_engine-{idefics2_engine.__version__}.dist-info/METADATA"
        ).decode()
    code = {str(file.relative_to(ROOT)).partition("/")[2] for file in FILES}
    assert {name for name in names if name.endswith(".py")} == code
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "idefics2_bench",
        "idefics2_engine",
        "idefics2_kernels",
    }
    assert {"idefics2_engine/py.typed", "idefics2_kernels/py.typed"} <= names
    golden = ROOT / "engine/idefics2_engine/parity/golden"
    assert {f"idefics2_engine/parity/golden/{p.name}" for p in golden.glob("*.json")} <= names
    for folder, inside in (("demo", "demo"), ("images", "demo_images")):
        files = {p.name for p in (ROOT / "examples" / folder).iterdir()}
        assert files
        assert files == {Path(n).name for n in names if n.startswith(f"idefics2_engine/{inside}/")}
    assert f"\nVersion: {idefics2_engine.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


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


def test_version_is_defined_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "engine/idefics2_engine/__init__.py"


class TestConstraints:
    """Tests that ``constraints.txt`` pins every package of a development installation."""

    PINS: ClassVar[dict[str, str]] = dict(
        re.findall(r"^([^#=\s]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )

    def requirements(self) -> Iterator[Requirement]:
        """Yield direct and transitive requirements, as far as they apply to this machine."""
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
                # A package that is not installed here has no known requirements
                continue
            extras = requirement.extras or {""}
            todo += [
                r
                for r in map(Requirement, below)
                if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
            ]

    def test_every_requirement_is_pinned(self) -> None:
        pinned_by_torch = ("nvidia-", "cuda-")
        for requirement in self.requirements():
            name = canonicalize_name(requirement.name)
            if not name.startswith(pinned_by_torch):
                assert name in self.PINS
                assert requirement.specifier.contains(self.PINS[name]), str(requirement)

    def test_tested_torch_and_triton(self) -> None:
        assert self.PINS["torch"] == "2.13.0"
        # torch 2.13.0 requires this version
        assert self.PINS["triton"] == "3.7.1"

    def test_pins_have_no_local_versions(self) -> None:
        # 2.13.0+cpu is on PyTorch's own index only
        assert [v for v in self.PINS.values() if not re.fullmatch(r"[0-9.]+(\.post\d+)?", v)] == []
