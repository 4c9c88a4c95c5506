"""Names of paths."""

from pathlib import Path

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.parity import Path as ParityPath


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("ours", ParityPath("ours")),
        ("ours:triton:bf16", ParityPath("ours", "triton", "bfloat16")),
        (
            "ours:float16:deterministic:nf4",
            ParityPath("ours", "deterministic", "float16", nf4=True),
        ),
        ("transformers:eager:fp32", ParityPath("transformers", "eager", "float32")),
        ("float64", ParityPath("float64")),
    ],
)
def test_path_is_parsed(text: str, path: ParityPath) -> None:
    assert ParityPath.parse(text) == path
    assert ParityPath.parse(str(path)) == path
    assert ParityPath.parse(path) is path


def test_folder_of_a_recording_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="or the folder of a recording, got"):
        ParityPath.parse(str(tmp_path))
    (tmp_path / "recording.json").write_text("{}")
    assert ParityPath.parse(str(tmp_path)).folder == tmp_path


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ours:sdpa", "'sdpa'"),
        ("ours:triton:reference", "'reference'"),
        ("ours:bf16:fp16", "'fp16'"),
        ("ours:nf4:nf4", "'nf4'"),
        ("transformers:nf4", "'nf4'"),
        ("float64:bf16", "'bf16'"),
        ("ours:", "''"),
        ("vllm", "'vllm'"),
    ],
)
def test_wrong_path_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"a path must be ours.*got {part}"):
        ParityPath.parse(text)
