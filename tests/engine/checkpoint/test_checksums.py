"""Checksums in sums files, in the hub's cache, and in the records of downloads."""

import hashlib
from pathlib import Path

import pytest

from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.errors import CheckpointError

WEIGHTS = b"weights"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
CONFIG = b'{"model_type": "idefics2"}'
CONFIG_SHA1 = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(CONFIG)
    return tmp_path


def check(folder: Path) -> None:
    verify_files(folder, [folder / "model.safetensors"])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    return str(caught.value)


def write_download_record(folder: Path, name: str, *lines: str) -> None:
    """Write the files that ``hf download --local-dir`` leaves."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True, exist_ok=True)
    (notes / f"{name}.metadata").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("SHA256SUMS", f"{SHA256}  model.safetensors\n"),
        ("SHA256SUMS", f"{SHA256} *model.safetensors"),
        ("SHA256SUMS", f"# ours\n\n{SHA256.upper()}  ./model.safetensors\r\n{OTHER}  gone.txt\n"),
        ("weights.sha256", f"{SHA256}  model.safetensors\n{OTHER}  onnx/model.safetensors\n"),
        ("model.safetensors.sha256", f"{SHA256}\n"),
    ],
)
def test_sums_files_are_checked(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    check(folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    got = hashlib.sha256(b"weightz").hexdigest()
    wanted = f"model.safetensors: checksum must be {SHA256} ({file}), got {got}"
    assert refusal(folder) == f"{folder}/{wanted}"


def test_output_of_sha256sum_is_accepted(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    check(folder)
    (folder / "config.json").write_bytes(CONFIG + b" ")
    said = refusal(folder)
    assert f"{folder / 'config.json'}: checksum must be" in said
    assert "model.safetensors" not in said


def test_checksums_of_the_hub_cache(folder: Path) -> None:
    blobs = folder / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / SHA256)
    (folder / "model.safetensors").symlink_to(f"blobs/{SHA256}")
    (folder / "config.json").rename(blobs / CONFIG_SHA1)
    (folder / "config.json").symlink_to(f"blobs/{CONFIG_SHA1}")
    check(folder)
    (blobs / SHA256).write_bytes(b"weightz")
    (blobs / CONFIG_SHA1).write_bytes(CONFIG.replace(b"2", b"3"))
    said = refusal(folder)
    assert f"model.safetensors: checksum must be {SHA256} (its name in the hub's cache)" in said
    assert f"config.json: checksum must be {CONFIG_SHA1} (its name in the hub's cache)" in said


def test_checksums_recorded_by_the_client(folder: Path) -> None:
    write_download_record(folder, "model.safetensors", "c" * 40, SHA256, "1712656091.1")
    write_download_record(folder, "config.json", "c" * 40, CONFIG_SHA1, "1712656091.1")
    check(folder)
    (folder / "config.json").write_bytes(b"{}")
    said = refusal(folder)
    source = ".cache/huggingface/download/config.json.metadata"
    assert f"config.json: checksum must be {CONFIG_SHA1} ({source})" in said


def test_all_sources_must_agree(folder: Path) -> None:
    write_download_record(folder, "model.safetensors", "c" * 40, SHA256, "1712656091.1")
    (folder / "SHA256SUMS").write_text(f"{OTHER}  model.safetensors\n")
    assert f"checksum must be {OTHER} (SHA256SUMS), got {SHA256}" in refusal(folder)
    (folder / "SHA256SUMS").write_text(f"{SHA256}  model.safetensors\n{OTHER}  model.safetensors\n")
    assert f"checksum must be {OTHER} (SHA256SUMS), got {SHA256}" in refusal(folder)


@pytest.mark.parametrize("digest", ["", "etag", '"abc"', "f" * 32, "g" * 64])
def test_missing_checksum_is_an_error(digest: str, folder: Path) -> None:
    write_download_record(folder, "model.safetensors", "c" * 40, digest)
    # This checksum is of another file
    (folder / "SHA256SUMS").write_text(f"{SHA256}  onnx/model.safetensors\n")
    (folder / "elsewhere" / "blobs").mkdir(parents=True)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'model.safetensors'}: has no checksum to be compared with")


@pytest.mark.parametrize(
    "line",
    [
        "model.safetensors",
        f"{SHA256[1:]}  model.safetensors",
        f"{SHA256}",
        f"{SHA256}model.safetensors",
        f"SHA256 (model.safetensors) = {SHA256}",
        f"\\{SHA256}  model\\nsafetensors",
    ],
)
def test_malformed_sums_are_refused(line: str, folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"# sums\n{line}\n")
    assert f"{folder / 'SHA256SUMS'}: line 2 must be 64 hexadecimal digits" in refusal(folder)


def test_sums_that_are_not_text_are_refused(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert f"{folder / 'SHA256SUMS'}: cannot be read as text" in refusal(folder)


def test_missing_file_is_an_error(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{SHA256}  model.safetensors\n")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: cannot be read: No such file" in refusal(folder)
