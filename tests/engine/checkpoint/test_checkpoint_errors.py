"""Broken checkpoints: each is refused with a precise error before anything is allocated."""

import contextlib
import copy
import json
import os
import pickle
import random
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import idefics2_engine.checkpoint.loader
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.safetensors_header import read_header
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.prompts.chat_template import ChatTemplate
from idefics2_engine.prompts.tokenizer import Tokenizer
from idefics2_engine.sampling.generation_config import GenerationConfig
from oracle import CASES, build_oracle, save_oracle
from paths import DEMO

CONFIG: dict[str, Any] = json.loads(CASES[0].config().to_json_string())
KEY_PROJ = "model.text_model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = save_oracle(build_oracle(CASES[0]), tmp_path_factory.mktemp("pristine"))
    return load_file(folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, pristine: dict[str, torch.Tensor]) -> Path:
    """Return a checkpoint of one file, which a test may break."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(pristine, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path, pristine: dict[str, torch.Tensor]) -> Path:
    """Return a checkpoint of four shards, which a test may break."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weight_map: dict[str, str] = {}
    names = sorted(pristine)
    for i in range(4):
        file = f"model-{i + 1:05}-of-00004.safetensors"
        weight_map |= dict.fromkeys(names[i::4], file)
        save_file({name: pristine[name] for name in names[i::4]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    assert caught.value.code == "checkpoint"
    return str(caught.value)


def stored(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with ``header``, which is written as JSON unless it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
GOOD = stored({"a": entry()}, EIGHT)
MALFORMED = {
    "empty file": (b"", "is empty"),
    "shorter than its length": (b"\x02\x00\x00", "got 3 bytes"),
    "header cut short": (GOOD[:30], "header has 61 bytes, the file 22"),
    "header longer than the file": (stored({}, length=5000), "header has 5000 bytes, the file 2"),
    "header of no bytes": (stored(b""), "must be a JSON object"),
    "huge header": (stored({}, length=2**63), "got 9223372036854775808"),
    "header not UTF-8": (stored(b'{"\xff": 1}'), "byte 2 is not UTF-8"),
    "header not JSON": (stored(b'{"a": '), "is not JSON"),
    "header a list": (stored([1]), "must be a JSON object"),
    "header nested deeply": (stored(b'{"a":' * 10**5), "nested too deeply"),
    "number of many digits": (stored(b'{"a": 1' + b"0" * 5000 + b"}"), "too many digits"),
    "name twice": (stored(b'{"a": 1, "a": 1}'), "the key 'a' twice"),
    "field twice": (stored(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
    "entry no object": (stored({"a": 7}), "must have dtype, shape and data_offsets, got 7"),
    "field missing": (stored({"a": {"dtype": "F32"}}), "must have dtype, shape and"),
    "field too many": (stored({"a": entry() | {"x": 1}}, EIGHT), "must have dtype, shape and"),
    "unknown dtype": (stored({"a": entry("F31")}, EIGHT), "unknown dtype: 'F31'"),
    "dtype no string": (stored({"a": entry(["F32"])}, EIGHT), "unknown dtype"),
    "negative size": (stored({"a": entry(shape=[-2])}, EIGHT), "shape must be sizes"),
    "fractional size": (stored({"a": entry(shape=[2.0])}, EIGHT), "shape must be sizes"),
    "true for a size": (stored({"a": entry("U8", [True], [0, 1])}, b"1"), "shape must be sizes"),
    "shape no list": (stored({"a": entry(shape="2")}, EIGHT), "shape must be sizes, got '2'"),
    "dimensions without end": (stored({"a": entry(shape=[1] * 99)}, EIGHT), "shape must be sizes"),
    "size overflows": (stored({"a": entry(shape=[2**63])}, EIGHT), "shape must be sizes"),
    "product overflows": (
        stored({"a": entry(shape=[2**32, 2**32, 2**30])}, EIGHT),
        "is 7.92281625142643e+28 bytes, got 8",
    ),
    "negative offset": (stored({"a": entry(offsets=[-8, 0])}, EIGHT), "data_offsets must be"),
    "descending offsets": (stored({"a": entry(offsets=[8, 0])}, EIGHT), "data_offsets must be"),
    "three offsets": (stored({"a": entry(offsets=[0, 4, 8])}, EIGHT), "data_offsets must be"),
    "fractional offset": (stored({"a": entry(offsets=[0, 8.0])}, EIGHT), "data_offsets must be"),
    "offsets beyond the file": (
        stored({"a": entry(), "b": entry(offsets=[8, 16])}, EIGHT),
        "is cut short: its tensors have 16 bytes, of which 8 are there",
    ),
    "shape larger than its bytes": (stored({"a": entry(shape=[3])}, EIGHT), "is 12 bytes, got 8"),
    "shape smaller than its bytes": (stored({"a": entry(shape=[1])}, EIGHT), "is 4 bytes, got 8"),
    "dtype of another width": (stored({"a": entry("F16")}, EIGHT), "is 4 bytes, got 8"),
    "half a byte": (stored({"a": entry("F4", [3], [0, 1])}, b"1"), "is 1.5 bytes, got 1"),
    "overlapping": (
        stored({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'b' begins inside another",
    ),
    "in the same place": (
        stored({"a": entry(), "b": entry()}, EIGHT),
        "tensor 'b' begins inside another",
    ),
    "a hole between": (
        stored({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "leaves 4 bytes before it unused",
    ),
    "a hole before the first": (
        stored({"a": entry(offsets=[4, 12])}, bytes(12)),
        "leaves 4 bytes before it unused",
    ),
    "trailing bytes": (GOOD + b"more", "has 4 bytes after its last tensor"),
    "data without tensors": (stored({}, EIGHT), "has 8 bytes after its last tensor"),
    "metadata no object": (stored({"__metadata__": "pt"}), "__metadata__ must map names to"),
    "metadata no strings": (stored({"__metadata__": {"a": 1}}), "__metadata__ must map names to"),
    "metadata twice": (stored(b'{"__metadata__": {}, "__metadata__": {}}'), "twice"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4943162240\n",
        "is a Git LFS pointer, not the weights",
    ),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "is a web page"),
    "web page without a type": (b"<html><head><title>404</title></head></html>", "is a web page"),
    "pickle": (pickle.dumps({"a": [1.0] * 9}, protocol=2), "is a pickle under another name"),
    "zip of pickles": (b"PK\x03\x04" + bytes(40), "is a pickle under another name"),
    "text": (b"weights go here, please", "is no safetensors file"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_files_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = MALFORMED[kind]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    said = refusal(tmp_path)
    assert said.startswith(f"{file}: ")
    assert message in said
    assert len(said) < 500 + len(str(file))


def test_valid_headers_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for header, data in (
        ({"a": entry()}, EIGHT),
        ({"a": entry("F64", [], [0, 8]), "b": entry("F32", [0, 7], [8, 8])}, EIGHT),
        ({"b": entry(offsets=[8, 16]), "a": entry(), "__metadata__": {"format": "pt"}}, bytes(16)),
    ):
        # The length of this header starts with the byte that starts a pickle
        padded = json.dumps(header).encode().ljust(640)
        file.write_bytes(stored(padded, data))
        assert {name: tensor.shape for name, tensor in read_header(file).items()} == {
            name: tuple(value["shape"]) for name, value in header.items() if name[0] != "_"
        }


def test_accepted_files_are_readable_by_the_library(tmp_path: Path) -> None:
    """Flip bytes, cut and extend files.

    No other error is raised, and every file that is accepted can be read by the library.
    """
    rng = random.Random(0)
    tensors = {"a": torch.ones(2, 3), "b.c": torch.ones(1, dtype=torch.float16), "d": torch.ones(0)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    good = file.read_bytes()
    accepted = 0
    for _ in range(2000):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            content[rng.randrange(len(content))] = rng.choice(b'\x00\xff{}[]",:-0123456789aeF')
        content = content[: rng.choice((len(content),) * 9 + (rng.randrange(len(content)),))]
        file.write_bytes(content)
        try:
            names = list(read_header(file))
        except CheckpointError:
            continue
        accepted += 1
        with safe_open(file, framework="pt") as opened:
            assert sorted(names) == sorted(opened.keys())
    assert 50 < accepted < 1900


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.int32, "I32"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_other_dtypes_are_refused(
    dtype: torch.dtype, kind: str, folder: Path, pristine: dict[str, torch.Tensor]
) -> None:
    save_file(pristine | {KEY_PROJ: pristine[KEY_PROJ].to(dtype)}, folder / "model.safetensors")
    assert f"'{KEY_PROJ}' must be F64, F32, F16, BF16, got {kind}" in refusal(folder)


def test_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 1)
    assert "is cut short: its tensors have" in refusal(folder)


def test_file_that_changes_during_reading_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut:
        def __init__(self, *args: Any) -> None:
            os.truncate(folder / "model.safetensors", 1000)
            monkeypatch.undo()
            self.model = Idefics2(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

    monkeypatch.setattr(idefics2_engine.checkpoint.loader, "Idefics2", Cut)
    assert "cannot be read as safetensors" in refusal(folder)


def test_nothing_is_allocated_for_tensors_that_do_not_fit(
    folder: Path, pristine: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Calling None would raise
    monkeypatch.setattr(idefics2_engine.checkpoint.loader, "Idefics2", None)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"text_config": CONFIG["text_config"] | {"hidden_size": 1 << 20}})
    )
    assert "must have shape" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {k: v for k, v in pristine.items() if "lm_head" not in k}, folder / "model.safetensors"
    )
    assert "tensors are missing: lm_head.weight" in refusal(folder)


class TestShards:
    def test_all_missing_files_are_named(self, shards: Path) -> None:
        gone = sorted(shards.glob("model-*"))[1:3]
        for file in gone:
            file.unlink()
        said = refusal(shards)
        assert "2 of 4 weight files are missing" in said
        assert all(file.name in said for file in gone)

    def test_tensor_missing_from_its_shard_is_an_error(self, shards: Path) -> None:
        index = shards / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra"] = "model-00002-of-00004.safetensors"
        index.write_text(json.dumps(content))
        said = refusal(shards)
        assert said.startswith(str(shards / "model-00002-of-00004.safetensors"))
        assert "lacks tensors that model.safetensors.index.json places in it: model.extra" in said

    def test_tensor_in_two_shards_is_refused(self, shards: Path) -> None:
        first, second = sorted(shards.glob("model-*"))[:2]
        name = next(iter(load_file(first)))
        save_file(load_file(second) | {name: torch.zeros(1)}, second)
        said = refusal(shards)
        assert f"{name!r} is in two shards: {first.name} and {second.name}" in said

    def test_tensor_in_the_wrong_shard_is_refused(self, shards: Path) -> None:
        first, second = sorted(shards.glob("model-*"))[:2]
        one, other = load_file(first), load_file(second)
        name = next(iter(one))
        other[name] = one.pop(name)
        save_file(one, first)
        save_file(other, second)
        assert f"{second}: holds {name!r}, which" in refusal(shards)

    def test_tensor_missing_from_the_index_is_refused(self, shards: Path) -> None:
        last = sorted(shards.glob("model-*"))[-1]
        save_file(load_file(last) | {"model.extra": torch.zeros(1)}, last)
        assert "holds 'model.extra', which model.safetensors.index.json places in nowhere" in (
            refusal(shards)
        )

    @pytest.mark.parametrize(
        "file",
        [
            "../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "C:x.safetensors",
            "..\\outside.safetensors", "x\0.safetensors", "pytorch_model.bin", "x" * 300 + ".safetensors",
            7, None, ["model.safetensors"],
        ],
    )  # fmt: skip
    def test_paths_in_the_index_are_refused(self, file: object, shards: Path) -> None:
        index = shards / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
        said = refusal(shards)
        assert "'lm_head.weight' must be in a .safetensors file of this folder, got" in said

    @pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
    def test_index_without_a_map_is_refused(self, content: object, shards: Path) -> None:
        (shards / "model.safetensors.index.json").write_text(json.dumps(content))
        assert "must hold a 'weight_map' object" in refusal(shards)

    def test_repeated_name_in_the_index_is_refused(self, shards: Path) -> None:
        index = shards / "model.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
        with pytest.raises(ConfigError, match="the key 'a' twice"):
            load_checkpoint(shards)

    def test_links_of_the_hub_cache_are_followed(self, shards: Path) -> None:
        blobs = shards / "blobs"
        snapshot = shards / "snapshots" / "abc"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(shards.glob("*.*"))):
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        load_checkpoint(snapshot)

    def test_single_file_takes_precedence_over_the_index(
        self, shards: Path, pristine: dict[str, torch.Tensor]
    ) -> None:
        changed = pristine | {"lm_head.weight": pristine["lm_head.weight"] + 1}
        save_file(changed, shards / "model.safetensors")
        model = load_checkpoint(shards)
        assert torch.equal(model.lm_head[:99], changed["lm_head.weight"])

    def test_names_are_safe_to_print(self, shards: Path) -> None:
        last = sorted(shards.glob("model-*"))[-1]
        names = ("\x1b[2J", "a\nb", "x" * 1000)
        save_file(load_file(last) | {name: torch.zeros(1) for name in names}, last)
        weight_map = dict.fromkeys(names, last.name)
        index = shards / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": content["weight_map"] | weight_map}))
        said = refusal(shards)
        assert r"tensors are not part of this model: '\x1b[2J', 'a\nb', 'xxx" in said
        assert said.isprintable()
        assert len(said) < 1000


class TestCode:
    """Tests that nothing in a checkpoint's folder is executed."""

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_are_refused_unread(self, name: str, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "exploded"),)

        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        said = refusal(tmp_path)
        assert f"only pickles ({name}), which are refused" in said
        assert not (tmp_path / "exploded").exists()

    def test_auto_map_is_ignored(self, folder: Path) -> None:
        auto_map = {"AutoConfig": "evil.Config", "AutoModelForVision2Seq": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": auto_map}))
        for name in ("evil", "modeling_idefics2", "configuration_idefics2"):
            (folder / f"{name}.py").write_text(
                "import pathlib; pathlib.Path(__file__).with_name('exploded').touch()"
            )
        load_checkpoint(folder)
        assert not (folder / "exploded").exists()
        assert "evil" not in sys.modules

    def test_pipes_are_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "config.json")
        # Opening a named pipe would wait for a writer
        with pytest.raises(ConfigError, match="must be a file"):
            load_checkpoint(tmp_path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        os.mkfifo(tmp_path / "model.safetensors")
        assert "must be a file" in refusal(tmp_path)


class TestFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite_are_refused(
        self, value: float, folder: Path, pristine: dict[str, torch.Tensor]
    ) -> None:
        tensors = {name: tensor.clone() for name, tensor in pristine.items()}
        tensors[KEY_PROJ][3, 5] = value
        save_file(tensors, folder / "model.safetensors")
        # The file is not read unless a check asks for it
        load_checkpoint(folder)
        said = refusal(folder, check_finite=True)
        assert (
            f"'{KEY_PROJ}' must be finite, got 1 values that are not, the first {value} at [3, 5]"
            in said
        )

    def test_value_that_overflows_the_dtype_is_refused(
        self, folder: Path, pristine: dict[str, torch.Tensor]
    ) -> None:
        tensors = {name: tensor.clone() for name, tensor in pristine.items()}
        tensors[KEY_PROJ][0, 1] = 1e5
        save_file(tensors, folder / "model.safetensors")
        load_checkpoint(folder, check_finite=True)
        load_checkpoint(folder, dtype=torch.bfloat16, check_finite=True)
        said = refusal(folder, dtype=torch.float16, check_finite=True)
        assert "must be finite in torch.float16, got 1 values that are not, the first inf" in said


class TestConfig:
    SIZES = (
        ("text_config", "hidden_size"),
        ("text_config", "intermediate_size"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "num_attention_heads"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "head_dim"),
        ("text_config", "vocab_size"),
        ("text_config", "max_position_embeddings"),
        ("vision_config", "hidden_size"),
        ("vision_config", "intermediate_size"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "num_attention_heads"),
        ("vision_config", "num_channels"),
        ("vision_config", "image_size"),
        ("vision_config", "patch_size"),
        ("perceiver_config", "resampler_n_latents"),
        ("perceiver_config", "resampler_depth"),
        ("perceiver_config", "resampler_n_heads"),
        ("perceiver_config", "resampler_head_dim"),
        ("perceiver_config", "num_key_value_heads"),
    )

    @pytest.mark.parametrize(("section", "key"), SIZES)
    def test_invalid_sizes_are_refused(self, section: str, key: str) -> None:
        values: tuple[object, ...] = (
            -1,
            0,
            True,
            False,
            2.0,
            1e300,
            "64",
            [64],
            {},
            2**31,
            2**62,
            10**4000,
        )
        for value in values:
            config = CONFIG | {section: CONFIG[section] | {key: value}}
            with pytest.raises(ConfigError) as caught:
                ModelConfig.from_dict(config)
            said = str(caught.value)
            assert said.startswith(f"{section}: {key} must be ")
            assert len(said) < 250

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"text_config": [1]}, "config.json: text_config must be an object, got [1]"),
            ({"vision_config": "x"}, "config.json: vision_config must be an object, got 'x'"),
            ({"text_config": {"rope_parameters": 3}}, "rope_parameters must be an object, got 3"),
            ({"text_config": {"rope_theta": float("nan")}}, "rope_theta must be a positive number"),
            ({"text_config": {"rope_theta": 1e300}}, "rope_theta must be a positive number"),
            ({"text_config": {"rms_norm_eps": "1e-5"}}, "rms_norm_eps must be a positive number"),
            (
                {"text_config": {"head_dim": 127}},
                "head_dim must be even for rotary angles, got 127",
            ),
            ({"vision_config": {"image_size": 13, "patch_size": 14}}, "at least patch_size 14"),
            ({"vision_config": {"num_channels": 4}}, "num_channels must be 3, got 4"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got"),
            ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
            ({"model_type": None}, "model_type must be 'idefics2', got none"),
            ({"model_type": ["idefics2"]}, "model_type must be 'idefics2', got ['idefics2']"),
            ({"image_token_id": 1.5}, "image_token_id must be a token id, got 1.5"),
            ({"model_type": "x" * 10**6}, "model_type must be 'idefics2', got 'xxx"),
            (
                {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
                "quantization_config: bnb_4bit_quant_type must be 'nf4', got 'fp4'",
            ),
        ],
    )
    def test_other_invalid_values_are_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_dict({"model_type": "idefics2", "image_token_id": 5} | change)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 250

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not JSON: Expecting value in line 1, column 1"),
            (b'{"model_type": "idefics2",}', "is not JSON"),
            (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
            (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
            (b"\xef\xbb\xbf{}", "is not JSON"),
            (b"[" * 10**6, "is nested too deeply"),
            (b'{"a":' * 10**5, "is nested too deeply"),
            (b'{"a":' * 65 + b"0" + b"}" * 65, "lists must have at most 64 levels"),
            (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "lists must have at most 64 levels"),
            (b'{"a": 1' + b"0" * 10**5 + b"}", "has a number with too many digits"),
            (b'{"a": {"b": 1, "b": 2}}', "has the key 'b' twice in one object"),
            (b"null", "must hold a JSON object, got NoneType"),
            (b"<!DOCTYPE html>", "is not JSON"),
        ],
    )
    def test_malformed_config_files_are_refused(
        self, content: bytes, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            ModelConfig.load(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
        assert message in str(caught.value)

    def test_moderate_nesting_is_accepted(self, tmp_path: Path) -> None:
        deep = (
            b'{"a": ' + b"[" * 63 + b"]" * 63 + b', "model_type": "idefics2", "image_token_id": 5}'
        )
        (tmp_path / "config.json").write_bytes(deep)
        ModelConfig.load(tmp_path)

    def test_huge_file_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "config.json").open("wb") as file:
            # The file is sparse, so it uses no space
            file.truncate(10**10)
        with pytest.raises(ConfigError, match="must have at most 67108864 bytes, got 10000000000"):
            ModelConfig.load(tmp_path)

    def test_folder_instead_of_the_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").mkdir()
        with pytest.raises(ConfigError, match="must be a file"):
            ModelConfig.load(tmp_path)


class TestAnything:
    """Tests that an odd value anywhere in a JSON file raises ``ConfigError`` and nothing else."""

    ODD: tuple[Any, ...] = (
        None, True, False, 0, -1, 1, 2**40, 10**400, 1.5, float("nan"), float("inf"), "", "x",
        [], [1], ["a"], [None], [[]], [[5]], [{}], {}, {"a": 1}, {"content": 3},
    )  # fmt: skip
    READERS: dict[str, Callable[[Path], object]] = {  # noqa: RUF012
        "config": ModelConfig.load,
        "generation_config": GenerationConfig.load,
        "preprocessor_config": ImageConfig.load,
        "processor_config": lambda folder: ChatTemplate.load(folder, demo_tokenizer()),
        "tokenizer_config": Tokenizer.load,
    }

    def places(self, value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield place
        if isinstance(value, (dict, list)):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from self.places(value[key], (*place, key))

    def small_tokenizer(self) -> dict[str, Any]:
        """Return the demo's tokenizer with bytes alone, because it is read a thousand times."""
        content: dict[str, Any] = json.loads((DEMO / "tokenizer.json").read_text())
        model = content["model"]
        model["vocab"] = {piece: id for piece, id in model["vocab"].items() if id < 300}
        model["merges"] = []
        return content

    @pytest.mark.parametrize("name", READERS)
    def test_any_value_gives_a_config_or_config_error(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(self.small_tokenizer()))
        content = json.loads((DEMO / f"{name}.json").read_text())
        content |= {"chat_template": "{{ x }}"} if name == "processor_config" else {}
        read = longest = 0
        for place in self.places(content):
            if "added_tokens_decoder" in place[:1]:
                # This is not read, because tokenizer.json has the same content
                continue
            for odd in self.ODD if len(place) > 0 else ([], None, "x"):
                changed = {"": copy.deepcopy(content)}
                inner: Any = changed
                for key in ("", *place)[:-1]:
                    inner = inner[key]
                inner[("", *place)[-1]] = odd
                (tmp_path / f"{name}.json").write_text(json.dumps(changed[""]))
                try:
                    self.READERS[name](tmp_path)
                    read += 1
                except ConfigError as error:
                    longest = max(longest, len(str(error)))
        assert read > 10
        assert 0 < longest < 1000

    def test_any_value_gives_a_tokenizer_or_config_error(self) -> None:
        content = self.small_tokenizer()
        settings = json.loads((DEMO / "tokenizer_config.json").read_text())
        small = {key: content[key] for key in ("normalizer", "decoder", "post_processor")}
        added = {"added_tokens": content["added_tokens"][:2]}
        top = [(key,) for key in content]
        read = 0
        for place in [*top, *self.places(small), *self.places(added)]:
            for odd in self.ODD if place else ():
                changed = copy.deepcopy(content)
                inner: Any = changed
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = odd
                with contextlib.suppress(ConfigError):
                    Tokenizer(changed, settings).encode("Hello <image> world")
                    read += 1
        assert read > 10
