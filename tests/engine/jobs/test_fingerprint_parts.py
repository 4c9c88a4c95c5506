"""The identity of a checkpoint changes with each of its files, and needs few of their bytes."""

import shutil
from pathlib import Path

import pytest

from idefics2_engine.demo import DEMO_MODEL
from idefics2_engine.jobs.fingerprint_parts import (
    adapter_parts,
    checkpoint_parts,
    sampling_parts,
)
from idefics2_engine.jobs.store.fingerprint import fingerprint
from idefics2_engine.sampling_params import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def test_copy_is_the_same_checkpoint(folder: Path) -> None:
    assert checkpoint_parts(folder) == checkpoint_parts(DEMO_MODEL)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"]
)
def test_every_file_counts(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert fingerprint(checkpoint_parts(folder)) != fingerprint(checkpoint_parts(DEMO_MODEL))


def test_chat_template_counts(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert checkpoint_parts(folder) != checkpoint_parts(DEMO_MODEL)


def test_weights_of_the_same_shapes_are_other_weights(folder: Path) -> None:
    """A fine-tuned checkpoint has the header and the size of the one that it was trained from."""
    (folder / "SHA256SUMS").unlink()
    before = checkpoint_parts(folder)["weights"]
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + bytes(len(content) - header))
    after = checkpoint_parts(folder)["weights"]
    assert before["model.safetensors"]["header"] == after["model.safetensors"]["header"]
    assert before != after


def test_published_checksum_counts(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  model.safetensors\n")
    assert checkpoint_parts(folder)["weights"]["model.safetensors"]["published"] == "0" * 64


def test_adapter(tmp_path: Path) -> None:
    assert adapter_parts(None) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    before = adapter_parts(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{ }")
    assert adapter_parts(tmp_path) != before


def test_sampling_parameters_have_a_fingerprint() -> None:
    biased = SamplingParams(logit_bias={7: 1.0}, stop=["a"])
    assert fingerprint(sampling_parts(biased)) != fingerprint(sampling_parts(SamplingParams()))
