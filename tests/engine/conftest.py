"""Fixtures: a tiny checkpoint and its model, for tests that change neither."""

from pathlib import Path

import pytest

from idefics2_engine import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoint once.

    A test that changes files writes its own copy.
    """
    # This import needs transformers. Without transformers test modules are skipped, but this file
    # is read.
    from tiny_checkpoint import write_checkpoint

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def llm(request: pytest.FixtureRequest, checkpoint: Path) -> LLM:
    """Load the model with the module's ``SETTINGS`` besides device and dtype."""
    settings = getattr(request.module, "SETTINGS", {})
    return LLM(checkpoint, device="cpu", dtype="float32", **settings)
