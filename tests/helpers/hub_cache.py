"""The cache of the hub's client, written by hand."""

import hashlib
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_snapshot(cache: Path, repo: str, files: dict[str, bytes], ref: str = "main") -> Path:
    """Write ``files`` as the hub's client does and return the folder of the snapshot."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / COMMIT
    for folder in (snapshot, storage / "blobs", (storage / "refs" / ref).parent):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / ref).write_text(COMMIT)
    for name, content in files.items():
        digest = sha256(content) if name.endswith(".safetensors") else git_sha1(content)
        (storage / "blobs" / digest).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot
