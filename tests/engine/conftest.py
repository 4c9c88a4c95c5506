"""A tiny checkpoint and the model in it, for tests that change neither."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from idefics2_engine import LLM
from idefics2_engine.prompts.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoint once; a test that changes files writes one of its own."""
    # Here, because it needs transformers, without which a module is skipped and this file is read
    from tiny_checkpoint import write_checkpoint

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def llm(request: pytest.FixtureRequest, checkpoint: Path) -> LLM:
    """Load the model, with what the module's ``SETTINGS`` say beside device and dtype."""
    settings = getattr(request.module, "SETTINGS", {})
    return LLM(checkpoint, device="cpu", dtype="float32", **settings)


@pytest.fixture(scope="module")
def one_tokenizer() -> Iterator[None]:
    """Load a tokenizer once, which takes longer than a tiny model, where models are loaded often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", cache(Tokenizer.load))
        yield
