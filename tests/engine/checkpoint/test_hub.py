"""Models by name: existing folders, the hub's cache, and downloads from a simulated hub."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants

from hub_cache import COMMIT, git_sha1, sha256, write_snapshot
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.checkpoint.hub import (
    find_adapter,
    find_model,
    find_model_config,
    is_hub_id,
)
from idefics2_engine.checkpoint.shards import weight_paths
from idefics2_engine.errors import CheckpointError, ConfigError
from tiny_checkpoint import write_checkpoint

NEEDED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
MODEL = dict.fromkeys(NEEDED, b"{}") | {"model.safetensors": b"weights"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


class TestNames:
    def test_folder_takes_precedence_over_the_hub(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_snapshot(cache, "org/name", MODEL)
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert find_model("org/name") == Path("org/name")
        assert find_model(tmp_path) == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_model("~/org") == tmp_path / "org"

    @pytest.mark.parametrize(
        "name",
        [
            "", ".../x", "nosuch", "no/such/folder", "/no/such", "../name", "org/..", "./org/name", "org/name@",
            "org/name@../../x", "org/name@/x", "org/name@a b", "org/name@-x", "org/na me", "org/name\n", "-org/name",
            "org/name\0", "org@main/name", "https://huggingface.co/org/name", "o" * 200 + "/name", "o" * 5000, "~nosuchuser/x",
        ],
    )  # fmt: skip
    def test_other_names_are_refused(self, name: str, cache: Path) -> None:
        assert not is_hub_id(name)
        with pytest.raises(ConfigError, match="model must be a folder or a hub id such as"):
            find_model(name)
        with pytest.raises(ConfigError, match="adapter must be a folder or a hub id such as"):
            find_adapter(name)

    def test_path_is_never_a_hub_id(self, cache: Path) -> None:
        write_snapshot(cache, "org/name", MODEL)
        with pytest.raises(ConfigError, match="must be a folder or a hub id"):
            find_model(Path("org/name"))

    def test_invalid_revisions_are_refused(self, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="revision is for models on the hub, got 'main'"):
            find_model(tmp_path, "main")
        with pytest.raises(ConfigError, match="the one that model names, 'v1', got 'v2'"):
            find_model("org/name@v1", "v2")
        with pytest.raises(ConfigError, match=r"a branch, a tag or a commit, got '\.\./x'"):
            find_model("org/name", "../x")
        with pytest.raises(ConfigError, match="a branch, a tag or a commit, got ''"):
            find_model("org/name", "")
        with pytest.raises(ConfigError, match="revision must come with a model"):
            LLM(revision="main")


class TestCache:
    def test_cached_model_is_found_without_a_network(self, cache: Path) -> None:
        main = write_snapshot(cache, "org/name", MODEL)
        write_snapshot(cache, "org/name", {}, ref="refs/pr/7")
        for name, revision in (
            ("org/name", None),
            ("org/name", "main"),
            ("org/name@main", None),
            ("org/name@main", "main"),
            (f"org/name@{COMMIT}", None),
            ("org/name@refs/pr/7", None),
        ):
            assert find_model(name, revision) == main

    def test_model_without_weights_is_found_for_its_config(self, cache: Path) -> None:
        files = {name: content for name, content in MODEL.items() if name in NEEDED}
        snapshot = write_snapshot(cache, "org/name", files)
        assert find_model_config("org/name") == snapshot
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids to download it"):
            find_model("org/name")
        (snapshot / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"lacks config\.json"):
            find_model_config("org/name")

    def test_cached_model_is_found_without_asking_the_hub(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main = write_snapshot(cache, "org/name", MODEL)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        assert find_model("org/name") == main

    def test_absent_model_is_an_error(self, cache: Path) -> None:
        write_snapshot(cache, "org/name", MODEL)
        for name in ("org/other", "org/name@v2", f"org/name@{'f' * 40}"):
            with pytest.raises(ConfigError) as caught:
                find_model(name)
            assert str(caught.value) == (
                f"model {name} is not in the cache, or not whole; HF_HUB_OFFLINE forbids to download it"
            )

    @pytest.mark.parametrize("name", MODEL)
    def test_incomplete_model_is_an_error(self, name: str, cache: Path) -> None:
        snapshot = write_snapshot(cache, "org/name", {k: v for k, v in MODEL.items() if k != name})
        with pytest.raises(ConfigError) as caught:
            find_model("org/name")
        assert f"model org/name is not whole in the cache: {snapshot}" in str(caught.value)
        assert name in str(caught.value)

    def test_missing_shard_is_an_error(self, cache: Path) -> None:
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        files = dict.fromkeys(NEEDED, b"{}") | {
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            "model-1.safetensors": b"",
        }
        snapshot = write_snapshot(cache, "org/name", files)
        with pytest.raises(ConfigError, match=r"1 of 2 weight files are missing: model-2"):
            find_model("org/name")
        write_snapshot(cache, "org/name", {"model-2.safetensors": b"2"})
        assert find_model("org/name") == snapshot

    def test_missing_blob_is_an_error(self, cache: Path) -> None:
        snapshot = write_snapshot(cache, "org/name", MODEL)
        (snapshot / "model.safetensors").resolve().unlink()
        with pytest.raises(ConfigError, match="is not whole in the cache"):
            find_model("org/name")

    def test_adapters_are_found(self, cache: Path) -> None:
        snapshot = write_snapshot(cache, "org/lora", ADAPTER)
        assert find_adapter("org/lora") == find_adapter("org/lora@main") == snapshot
        write_snapshot(cache, "org/half", {"adapter_config.json": b"{}", "adapter_model.bin": b""})
        with pytest.raises(ConfigError, match=r"lacks adapter_model\.safetensors"):
            find_adapter("org/half")

    def test_image_settings_may_be_inside_the_processors(self, cache: Path) -> None:
        nested = {"processor_config.json": b'{"image_processor": {}}'}
        files = {name: content for name, content in MODEL.items() if "preprocessor" not in name}
        snapshot = write_snapshot(cache, "org/name", files | nested)
        assert find_model("org/name") == snapshot
        write_snapshot(
            cache, "org/other", files | {"processor_config.json": b'{"image_seq_len": 64}'}
        )
        with pytest.raises(ConfigError, match=r"not whole in the cache: .*/preprocessor_config"):
            find_model("org/other")

    def test_adapter_and_model_are_not_interchangeable(self, cache: Path) -> None:
        write_snapshot(cache, "org/lora", ADAPTER)
        write_snapshot(cache, "org/name", MODEL)
        with pytest.raises(ConfigError, match=r"^model org/lora@main: is an adapter, not a model:"):
            find_model("org/lora@main")
        with pytest.raises(ConfigError, match=r"^adapter org/name: is a model, not an adapter:"):
            find_adapter("org/name")

    @pytest.mark.parametrize("whole", [False, True])
    def test_hub_is_asked_if_the_cache_has_only_the_adapter(
        self, whole: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hub is asked before an error is raised.

        ``find_adapter`` downloads only the adapter of a repository that has both.
        """
        write_snapshot(cache, "org/both", ADAPTER)
        snapshot = cache / "models--org--both" / "snapshots" / COMMIT

        def download(repo: str, local_files_only: bool = False, **options: Any) -> str:
            if whole and not local_files_only:
                write_snapshot(cache, repo, MODEL)
            return str(snapshot)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        if whole:
            assert find_model("org/both") == snapshot
        else:
            with pytest.raises(ConfigError, match=r"^model org/both: is an adapter, not a model:"):
                find_model("org/both")

    def test_model_from_the_cache_answers(self, cache: Path, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "tiny", max_shard_size="1MB")
        files = {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()}
        snapshot = write_snapshot(cache, "org/tiny", files)
        llm = LLM("org/tiny@main", device="cpu", verify=True)
        assert len(llm.generate("Hello", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) > 0
        shard = sorted(snapshot.glob("model-*"))[0]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.resolve().write_bytes(content)
        # Only a checksum shows the flipped bit
        LLM("org/tiny", device="cpu")
        with pytest.raises(CheckpointError, match=f"{shard.name}: checksum must be"):
            LLM("org/tiny", device="cpu", verify=True)


def test_missing_extra_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find_model(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match=r"pip install '\.\[hub\]'"):
        find_model("org/name")


class TestErrors:
    """Other errors of the client are reported in one line, and not as internal failures."""

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
            (RuntimeError("first\nsecond"), "RuntimeError: first"),
        ],
    )
    def test_other_client_errors_are_one_line(
        self, error: Exception, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, local_files_only: bool = False, **options: Any) -> str:
            raise FileNotFoundError if local_files_only else error

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ConfigError) as caught:
            find_model("org/name")
        assert str(caught.value) == f"model org/name: it cannot be had from the hub: {message}"

    def test_names_refused_by_the_client_are_errors(self, cache: Path) -> None:
        with pytest.raises(ConfigError, match=r"model org/na--me: .*HFValidationError"):
            find_model("org/na--me")

    def test_repository_without_the_files_is_an_error(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}

        def download(repo: str, local_files_only: bool = False, **options: Any) -> str:
            if local_files_only:
                raise FileNotFoundError
            asked.update(options, repo=repo)
            return str(write_snapshot(cache, repo, dict.fromkeys(NEEDED, b"{}")))

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(CheckpointError) as caught:
            find_model("org/name@v1")
        assert "model org/name@v1: its repository is not whole: " in str(caught.value)
        assert "holds neither model.safetensors nor" in str(caught.value)
        assert "(pickled weights are not downloaded)" in str(caught.value)
        assert asked == {
            "repo": "org/name",
            "revision": "v1",
            "allow_patterns": ["*.json", "*.jinja", "*.safetensors"],
            "ignore_patterns": ["*/*"],
        }


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub that a download needs."""

    files: ClassVar[dict[str, bytes]] = MODEL | {
        "chat_template.jinja": b"{{ messages }}",
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"import os",
        "README.md": b"# A model",
        "onnx/model.safetensors": b"another",
    }
    requests: ClassVar[list[str]] = []
    tokens: ClassVar[dict[str, str | None]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Hub.requests.append(f"{self.command} {path}")
        Hub.tokens[path] = self.headers["Authorization"]
        resolve = f"/org/name/resolve/{COMMIT}/"
        if "gated" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "private" in path:
            self.reply(401, b"{}")
        elif "secret" in path:
            self.reply(403, b"{}")
        elif "broken" in path:
            self.reply(418, b"{}")
        elif path == "/api/models/org/name/revision/v9":
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == "/api/models/org/name/revision/main":
            self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            self.reply(200, json.dumps([self.entry(name) for name in self.files]).encode())
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            content = self.files[path.removeprefix(resolve)]
            digest = sha256(content) if "safetensors" in path else git_sha1(content)
            self.reply(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = git_sha1(content)
        if name.endswith("safetensors"):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """Return the address of a running hub."""
    Hub.requests.clear()
    Hub.tokens.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def find_in_a_process(names: list[str], home: Path, **settings: str) -> list[str]:
    """Find models one after another in a separate process, which reads the settings.

    Return folders or errors.
    """
    code = (
        "import sys; from idefics2_engine.checkpoint.hub import find_model\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(find_model(name))\n"
        "    except ValueError as error: print('error:', str(error))\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | settings
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_download(hub: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    found = find_in_a_process(["org/name"], tmp_path, HF_ENDPOINT=hub, HF_TOKEN="hf_secret")
    assert found == [str(snapshot)]
    assert {file.name for file in snapshot.iterdir()} == {*MODEL, "chat_template.jinja"}
    assert not [r for r in Hub.requests if any(x in r for x in ("bin", ".py", "README", "onnx"))]
    tokens = {token for path, token in Hub.tokens.items() if "org/name" in path}
    assert tokens == {"Bearer hf_secret"}
    verify_files(snapshot, weight_paths(snapshot))

    Hub.requests.clear()
    again = find_in_a_process(["org/name", "org/name@main"], tmp_path, HF_ENDPOINT=hub)
    assert again == [str(snapshot)] * 2
    assert not [r for r in Hub.requests if "org/name" in r]
    assert find_in_a_process(["org/name"], tmp_path, HF_HUB_OFFLINE="1") == [str(snapshot)]

    # This is the state after an interrupted download
    (snapshot / "tokenizer.json").unlink()
    assert find_in_a_process(["org/name"], tmp_path, HF_ENDPOINT=hub) == [str(snapshot)]
    assert (snapshot / "tokenizer.json").exists()


def test_refusals_of_the_hub_are_errors(hub: str, tmp_path: Path) -> None:
    wanted = {
        "org/gated": "access to it must be granted: accept its terms on its page on the hub",
        "org/secret": "access to it must be granted: accept its terms on its page on the hub",
        "org/private": "the hub has no such repository, or it is private and HF_TOKEN does not",
        "org/nosuch": "the hub has no such repository, or it is private and HF_TOKEN does not",
        "org/name@v9": "its repository has no such revision",
        "org/broken": "the hub answers with status 418",
    }
    said = find_in_a_process([*wanted], tmp_path, HF_ENDPOINT=hub)
    for line, (name, why) in zip(said, wanted.items(), strict=True):
        assert line.startswith(f"error: model {name}: {why}")


def test_unreachable_hub_is_an_error(tmp_path: Path) -> None:
    said = find_in_a_process(["org/name"], tmp_path, HF_ENDPOINT="http://127.0.0.1:1")
    assert said == ["error: model org/name: it is not in the cache, and the hub cannot be reached"]
