"""Reading the files of a model folder: every obstacle is named, and no read waits forever."""

import json
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from idefics2_engine import LLM
from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.checkpoint.companion_files import read_companions
from idefics2_engine.checkpoint.hub import find_adapter, find_model
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.shards import find_weights, pickles, weight_paths
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import CheckpointError, ConfigError, Idefics2Error
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model_files import is_there, open_file, read_file, read_text
from idefics2_engine.sampling.generation_config import GenerationConfig
from paths import DEMO


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Link the demo checkpoint, with the template and the image settings in files of their own."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.name not in ("processor_config.json", "SHA256SUMS"):
            (folder / file.name).symlink_to(file)
    values = json.loads((DEMO / "processor_config.json").read_text())
    (folder / "chat_template.jinja").write_text(values.pop("chat_template"))
    (folder / "processor_config.json").write_text(json.dumps(values))
    return folder


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_endless_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder_of_that_name(path: Path) -> None:
    path.mkdir()


def link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def link_through_a_file(path: Path) -> None:
    path.with_name("file").touch()
    path.symlink_to("file/below")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        # The path of a socket must be short
        descriptor = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)


def terabytes(path: Path) -> None:
    with path.open("wb") as file:
        # The file is sparse, so it uses no space
        file.truncate(1 << 42)


OBSTACLES: dict[Callable[[Path], None], str] = {
    pipe: "must be a file, got a pipe",
    link_to_a_pipe: "must be a file, got a pipe",
    link_to_endless_zeros: "must be a file, got a device",
    folder_of_that_name: "must be a file, got a folder",
    link_to_a_folder: "must be a file, got a folder",
    link_to_itself: "cannot be read: Too many levels of symbolic links",
    broken_link: "cannot be read: No such file or directory",
    link_through_a_file: "cannot be read: Not a directory",
    bound_socket: "cannot be read: No such device or address",
    terabytes: "must have at most ",
}
obstacles = pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda make: make.__name__)


def create_obstacle(obstacle: Callable[[Path], None], path: Path) -> str:
    """Create ``obstacle`` at ``path``; return the expected beginning of its error."""
    path.unlink(missing_ok=True)
    obstacle(path)
    return f"{path}: {OBSTACLES[obstacle]}"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Idefics2Error) as caught:
        call()
    return str(caught.value)


@obstacles
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
        "model.safetensors",
    ],
)  # fmt: skip
def test_obstacles_in_model_files_are_named(
    name: str, obstacle: Callable[[Path], None], demo: Path
) -> None:
    begin = create_obstacle(obstacle, demo / name)
    assert refusal(lambda: LLM(demo, device="cpu")).startswith(begin)


@obstacles
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-1.safetensors"])
def test_obstacles_in_shards_are_named(
    name: str, obstacle: Callable[[Path], None], demo: Path
) -> None:
    (demo / "model.safetensors").unlink()
    index = demo / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    begin = create_obstacle(obstacle, demo / name)
    said = refusal(lambda: load_checkpoint(demo))
    is_missing = name.startswith("model-1") and not os.path.exists(demo / name)
    assert said.startswith(
        f"{demo}: 1 of 1 weight files are missing: {name}" if is_missing else begin
    )


@obstacles
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_obstacles_in_adapter_files_are_named(
    name: str, obstacle: Callable[[Path], None], tmp_path: Path
) -> None:
    values = {"peft_type": "LORA", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    begin = create_obstacle(obstacle, tmp_path / name)
    assert refusal(lambda: load_checkpoint(DEMO, adapter=tmp_path)).startswith(begin)


@obstacles
@pytest.mark.parametrize(
    "name",
    [
        "SHA256SUMS", "model.safetensors.sha256", "model.safetensors", "config.json", "chat_template.jinja",
        ".cache/huggingface/download/model.safetensors.metadata",
    ],
)  # fmt: skip
def test_obstacles_in_verified_files_are_named(
    name: str, obstacle: Callable[[Path], None], demo: Path
) -> None:
    names = ("config.json", "model.safetensors", "chat_template.jinja")
    (demo / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    (demo / name).parent.mkdir(parents=True, exist_ok=True)
    begin = create_obstacle(obstacle, demo / name)
    said = refusal(lambda: verify_files(demo, [demo / "model.safetensors"]))
    assert said.startswith(begin)


@obstacles
def test_failed_copy_changes_no_file(obstacle: Callable[[Path], None], demo: Path) -> None:
    """No file is written or removed before all files to copy have been read."""
    model = load_checkpoint(demo)
    target = demo.with_name("out")
    save_checkpoint(model, target, config_from=demo)
    before = {file.name: file.stat() for file in target.iterdir()}
    begin = create_obstacle(obstacle, demo / "notes.json")
    said = refusal(lambda: save_checkpoint(model, target, config_from=demo))
    assert said.startswith(begin)
    assert {file.name: file.stat() for file in target.iterdir()} == before


@pytest.mark.parametrize(
    "read",
    [
        ModelConfig.load, GenerationConfig.load, ImageConfig.load, find_weights, weight_paths,
        lambda folder: load_checkpoint(DEMO, adapter=folder),
        lambda folder: verify_files(folder, [folder / "model.safetensors"]),
    ],
)  # fmt: skip
def test_invalid_folder_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    """A file, an impossible name or a long name raises no bare ``OSError`` or ``ValueError``."""
    (tmp_path / "file").touch()
    for name in ("file", "gone", "x" * 300, "a\0b", "\ud800"):
        if read == GenerationConfig.load:
            assert read(tmp_path / name) == GenerationConfig(frozenset(), ())
        else:
            assert refusal(partial(read, tmp_path / name)).isprintable()


def test_permission_errors_are_named(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission errors are simulated, because tests may run as root."""
    opened, forbidden = os.open, {"config.json", "model.safetensors", "SHA256SUMS"}

    def refuse(path: str | Path, *args: int, **options: int) -> int:
        if os.path.basename(path) in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    (demo / "SHA256SUMS").touch()
    monkeypatch.setattr(os, "open", refuse)
    for name, call in (
        ("SHA256SUMS", lambda: LLM(demo, device="cpu", verify=True)),
        ("config.json", lambda: LLM(demo, device="cpu")),
        ("model.safetensors", lambda: LLM(demo, device="cpu")),
    ):
        assert refusal(call) == f"{demo / name}: cannot be read: Permission denied"
        forbidden.remove(name)
    LLM(demo, device="cpu")


def test_read_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with (
        pytest.raises(CheckpointError, match=r"a\.json: cannot be read: Input/output error"),
        open_file(tmp_path / "a.json", CheckpointError),
    ):
        raise OSError(5, "Input/output error")


def test_growing_file_is_read_up_to_its_first_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    with open_file(tmp_path / "a.json") as (file, size):
        with (tmp_path / "a.json").open("ab") as more:
            more.write(b"more")
        assert (file.read(size), size) == (b"{}", 2)


def test_text_is_decoded_as_in_python(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    content = "{{ 'é' }}\r\nb\rc\n".encode()
    path.write_bytes(content)
    assert read_text(path) == path.read_text(encoding="utf-8") == "{{ 'é' }}\nb\nc\n"
    assert read_file(path) == content
    path.write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="cannot be read as text: byte 2 is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "most"), [("a.json", 1 << 26), ("a.jinja", 1 << 20), ("SHA256SUMS", 1 << 24)]
)
def test_each_kind_of_file_has_a_size_limit(name: str, most: int, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, most)
    with open_file(tmp_path / name) as (_, size):
        assert size == most
    os.truncate(tmp_path / name, most + 1)
    with pytest.raises(ConfigError, match=f"must have at most {most} bytes, got {most + 1}"):
        read_file(tmp_path / name)


def test_broken_link_counts_as_present(tmp_path: Path) -> None:
    """An optional file whose link is broken counts as present, so that it is reported."""
    (tmp_path / "link").symlink_to("nowhere")
    assert is_there(tmp_path / "link")
    assert not is_there(tmp_path / "nowhere")


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "é" * 130 + ".safetensors", "\U0001f600" * 61 + ".safetensors", "\ud800.safetensors",
            "\x1b[2J.safetensors", "a\nb.safetensors", "\u202e.safetensors", "\x9b.safetensors",
        ],
    )  # fmt: skip
    def test_names_in_an_index_are_refused(self, name: str, tmp_path: Path) -> None:
        """The names are too long in bytes but not in characters, not text, or terminal commands."""
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        for read in (find_weights, weight_paths):
            with pytest.raises(CheckpointError) as caught:
                read(tmp_path)
            said = str(caught.value)
            assert "'lm_head.weight' must be in a .safetensors file of this folder, got" in said
            assert said.isprintable()

    def test_longest_file_name_is_accepted(self, tmp_path: Path) -> None:
        name = "é" * 121 + "x.safetensors"
        assert len(name.encode()) == 255
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="1 of 1 weight files are missing: é"):
            find_weights(tmp_path)
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match="is empty"):
            find_weights(tmp_path)

    def test_names_of_files_in_a_folder_are_escaped(self, tmp_path: Path) -> None:
        folder = tmp_path / "\x1b[31m"
        folder.mkdir()
        (folder / "\x1b[2J.bin").touch()
        assert pickles(folder) == [r"'\x1b[2J.bin'"]
        (folder / "\x1b[2J.sha256").write_text("what?\n")
        (folder / "\x1b[2J.json").mkdir()
        for call in (
            lambda: ModelConfig.load(folder),
            lambda: find_weights(folder),
            lambda: verify_files(folder, [folder / "model.safetensors"]),
            lambda: read_companions(folder),
        ):
            said = refusal(call)
            assert said.isprintable()
            assert r"\x1b[31m" in said
        digest = "0" * 64
        (folder / "\x1b[2J.sha256").write_text(f"{digest}  model.safetensors\n")
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0[1, 2] ")
        for call in (
            lambda: find_weights(folder),
            lambda: verify_files(folder, [folder / "model.safetensors"]),
        ):
            assert refusal(call).isprintable()


class TestKind:
    """Tests that the error names an adapter given as the model, or a model as the adapter."""

    @pytest.fixture
    def lora(self, tmp_path: Path) -> Path:
        folder = tmp_path / "lora"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.safetensors").touch()
        return folder

    @pytest.mark.parametrize("verify", [False, True])
    def test_adapter_as_the_model_is_refused(self, verify: bool, lora: Path) -> None:
        wanted = re.escape(f"{lora}: is an adapter, not a model: name it with --adapter")
        for call in (
            lambda: LLM(lora, device="cpu", verify=verify),
            lambda: find_model(str(lora)),
            lambda: load_checkpoint(lora),
        ):
            with pytest.raises(ConfigError, match=wanted):
                call()

    @pytest.mark.parametrize("verify", [False, True])
    def test_model_as_the_adapter_is_refused(self, verify: bool) -> None:
        wanted = re.escape(f"{DEMO}: is a model, not an adapter: name it with --model")
        for call in (
            lambda: LLM(DEMO, device="cpu", adapter=DEMO, verify=verify),
            lambda: find_adapter(DEMO),
            lambda: load_checkpoint(DEMO, adapter=DEMO),
        ):
            with pytest.raises(ConfigError, match=wanted):
                call()

    def test_folder_may_hold_both(self, lora: Path) -> None:
        """Trainers save these files beside an adapter."""
        (lora / "config.json").symlink_to(DEMO / "config.json")
        assert find_model(lora) == find_adapter(lora) == lora
