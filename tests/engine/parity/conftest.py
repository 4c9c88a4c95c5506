"""Recordings of the demo model that tests of parity share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record the reference in fp32."""
    from parity_recordings import record_path

    folder: Path = tmp_path_factory.mktemp("parity") / "ours"
    record_path("ours:reference", folder)
    return folder


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record transformers in fp32."""
    pytest.importorskip("transformers")
    from parity_recordings import record_path

    folder: Path = tmp_path_factory.mktemp("parity") / "theirs"
    record_path("transformers", folder)
    return folder
