"""Fixtures: a tiny checkpoint, and arguments that the command may change."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # This import needs transformers, without which test modules are skipped
    from tiny_checkpoint import write_checkpoint

    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what the command changes."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
