"""Every mutation of ``make mutants`` changes the current text of a kernel.

Only ``make mutants`` tests whether they are noticed.
"""

import shutil
from pathlib import Path

import pytest

from mutants import PACKAGE, Mutation, mutations


@pytest.mark.parametrize("mutation", mutations(), ids=lambda one: f"{one.file}-{one.name}")
def test_mutation_applies(mutation: Mutation, tmp_path: Path) -> None:
    file = f"{mutation.file}.py"
    (tmp_path / file).parent.mkdir(exist_ok=True)
    shutil.copy(PACKAGE / file, tmp_path / file)
    mutation.apply(tmp_path)
    mutated = (tmp_path / file).read_text(encoding="utf-8")
    assert mutated != (PACKAGE / file).read_text(encoding="utf-8")
    compile(mutated, file, "exec")
