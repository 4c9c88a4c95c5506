"""Tests that benchmarks and tests use no underscore name of another module."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from paths import ROOT

CHECKED = ("bench", "tests")
ALL = ("engine", "kernels", "examples", *CHECKED)


def files(*roots: str) -> list[Path]:
    return [file for root in roots for file in sorted((ROOT / root).rglob("*.py"))]


def is_private(name: str) -> bool:
    return (
        name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"
    )


@cache
def defined(file: Path) -> frozenset[str]:
    """Return the private names that ``file`` defines, attributes and methods included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{node.attr}":
            names.add(node.attr)
    return frozenset(filter(is_private, names))


def private_uses(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name for every use of a private name of an object or a module in ``file``.

    A name in a string counts as well, because of ``setattr`` and similar functions. The exception
    is names of Triton's kernels, by which compiled code is found.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if not node.value.endswith("_kernel") else []
        else:
            continue
        for name in names:
            if is_private(name):
                yield node.lineno, name


def foreign_uses(file: Path, ours: frozenset[str]) -> list[str]:
    """Return uses of private names that other files define and this one does not."""
    return [
        f"{file.name}:{line} {name}"
        for line, name in private_uses(file)
        if name in ours - defined(file)
    ]


@cache
def all_private_names() -> frozenset[str]:
    return frozenset().union(*map(defined, files(*ALL)))


@pytest.mark.parametrize("root", CHECKED)
def test_modules_use_no_private_name_of_another_module(root: str) -> None:
    uses = [use for file in files(root) for use in foreign_uses(file, all_private_names())]
    assert uses == []


def test_foreign_uses_finds_every_form_of_private_name(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "from module import _function, public\n"
        "_own = public._attribute\n"
        "setattr(public, '_in_a_string', _own)\n"
        "public._written = 1\n"
        "public._own, public.__dunder__, public._of_a_library, '_a_kernel'\n"
    )
    ours = frozenset({"_function", "_attribute", "_in_a_string", "_written", "_own", "_a_kernel"})
    assert sorted(foreign_uses(file, ours)) == [
        "test_it.py:1 _function",
        "test_it.py:2 _attribute",
        "test_it.py:3 _in_a_string",
        "test_it.py:4 _written",
    ]
