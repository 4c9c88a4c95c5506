"""Config and weights: loading the hub's files and writing them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Idefics2Config, Idefics2ForConditionalGeneration

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.tensor_mapping import hub_tensors
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.sampling.generation_config import GenerationConfig
from oracle import CASES, TinyCase, build_oracle, save_oracle
from paths import EIGHT_B

ONE_IMAGE = CASES[0]
TIED = next(case for case in CASES if case.tied)


def make_checkpoint(folder: Path, case: TinyCase = ONE_IMAGE) -> Any:
    oracle = build_oracle(case)
    save_oracle(oracle, folder)
    return oracle


def test_hub_config_describes_the_8b_model() -> None:
    config = ModelConfig.load(EIGHT_B)
    rows = [line.split("\t") for line in (EIGHT_B / "parameters.tsv").read_text().splitlines()[1:]]
    expected = {name: tuple(map(int, shape.split("x"))) for name, shape in rows}
    assert len(expected) == 763
    assert {tensor.name: tensor.shape for tensor in hub_tensors(config)} == expected
    assert sum(map(math.prod, expected.values())) == 8_402_768_112
    assert (config.text.sliding_window, config.text.rope_theta) == (4096, 10000.0)
    assert config.perceiver.rms_norm_eps == config.text.rms_norm_eps == 1e-5
    assert config.vision.layer_norm_eps == 1e-6
    assert (config.vision.head_dim, config.perceiver.head_dim, config.text.head_dim) == (
        72,
        96,
        128,
    )


def test_hub_tensors_fill_every_parameter_of_the_8b_model() -> None:
    config = ModelConfig.load(EIGHT_B)
    parameters = dict(Idefics2(config, device="meta").named_parameters())
    filled: dict[str, list[tuple[int, int]]] = {}
    for tensor in hub_tensors(config):
        rows = parameters[tensor.parameter][tensor.first_row : tensor.first_row + tensor.shape[0]]
        assert rows.numel() == math.prod(tensor.shape), tensor.name
        filled.setdefault(tensor.parameter, []).append(
            (tensor.first_row, tensor.first_row + tensor.shape[0])
        )
    padded = {"text.embedding", "lm_head"}
    for name, parameter in parameters.items():
        edges = [edge for rows in sorted(filled[name]) for edge in rows]
        wanted = config.text.vocab_size if name in padded else parameter.shape[0]
        assert edges[0] == 0, name
        assert edges[1:-1:2] == edges[2::2], name
        assert edges[-1] == wanted, name


def test_defaults_equal_transformers() -> None:
    theirs: Any = Idefics2Config()
    ours = ModelConfig.from_dict({"model_type": "idefics2", "image_token_id": 31999})
    for name, value in (
        ("hidden_size", theirs.vision_config.hidden_size),
        ("intermediate_size", theirs.vision_config.intermediate_size),
        ("num_layers", theirs.vision_config.num_hidden_layers),
        ("num_heads", theirs.vision_config.num_attention_heads),
        ("image_size", theirs.vision_config.image_size),
        ("patch_size", theirs.vision_config.patch_size),
        ("layer_norm_eps", theirs.vision_config.layer_norm_eps),
    ):
        assert getattr(ours.vision, name) == value, name
    for name, value in (
        ("vocab_size", theirs.text_config.vocab_size),
        ("intermediate_size", theirs.text_config.intermediate_size),
        ("num_layers", theirs.text_config.num_hidden_layers),
        ("num_heads", theirs.text_config.num_attention_heads),
        ("num_kv_heads", theirs.text_config.num_key_value_heads),
        ("head_dim", theirs.text_config.head_dim),
        ("max_positions", theirs.text_config.max_position_embeddings),
        ("rms_norm_eps", theirs.text_config.rms_norm_eps),
        ("sliding_window", theirs.text_config.sliding_window),
    ):
        assert getattr(ours.text, name) == value, name


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "model_type", "llava", "model_type must be 'idefics2', got 'llava'"),
        (None, "image_token_id", 99, "image_token_id must be below vocab_size 99, got 99"),
        (None, "image_token_id", -1, "image_token_id must be a token id, got -1"),
        ("text_config", "hidden_size", -64, "hidden_size must be a positive integer, got -64"),
        ("text_config", "hidden_size", 64.0, "hidden_size must be a positive integer, got 64.0"),
        ("text_config", "num_key_value_heads", 3, "multiple of key heads, got 4 and 3"),
        ("text_config", "rms_norm_eps", 0, "rms_norm_eps must be a positive number, got 0"),
        ("text_config", "hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "must be 'default', got 'yarn'"),
        (
            "vision_config",
            "num_attention_heads",
            5,
            "multiple of num_attention_heads, got 48 and 5",
        ),
        ("vision_config", "patch_size", True, "patch_size must be a positive integer, got True"),
        ("perceiver_config", "num_key_value_heads", 3, "multiple of key heads, got 4 and 3"),
    ],
)
def test_impossible_configs_are_refused(
    section: str | None, key: str, value: object, message: str
) -> None:
    config = json.loads(ONE_IMAGE.config().to_json_string())
    (config if section is None else config[section])[key] = value
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_unreadable_configs_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.load(tmp_path)


def test_rope_theta_is_read_from_either_place() -> None:
    for text in ({"rope_theta": 50.0}, {"rope_parameters": {"rope_theta": 50.0}}):
        config = {"model_type": "idefics2", "image_token_id": 5, "text_config": text}
        assert ModelConfig.from_dict(config).text.rope_theta == 50.0


def test_generation_config(tmp_path: Path) -> None:
    assert GenerationConfig.load(tmp_path) == GenerationConfig(frozenset(), ())
    assert GenerationConfig.load(EIGHT_B) == GenerationConfig(
        frozenset({2, 32002}), ((32000,), (32001,))
    )
    for key, value in (("eos_token_id", "2"), ("eos_token_id", [-1]), ("bad_words_ids", [[1.5]])):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(ConfigError, match=key):
            GenerationConfig.load(tmp_path)


@pytest.mark.parametrize("case", [ONE_IMAGE, TIED], ids=lambda case: case.name)
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["single", "sharded"])
def test_saved_checkpoint_equals_the_original(
    case: TinyCase, shard_bytes: int, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    oracle = build_oracle(case)
    oracle.save_pretrained(theirs, max_shard_size=shard_bytes)
    model = load_checkpoint(theirs)
    ours = tmp_path / "ours"
    save_checkpoint(model, ours, config_from=theirs, max_shard_bytes=shard_bytes)
    assert (len(list(ours.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    for file in ours.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes

    back = Idefics2ForConditionalGeneration.from_pretrained(ours)
    wanted = dict(oracle.named_parameters())
    assert dict(back.named_parameters()).keys() == wanted.keys()
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    again = load_checkpoint(ours)
    for mine, theirs_now in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs_now)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_convert_once(stored: torch.dtype, tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path)
    oracle.to(stored).save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, ours in (
        ("lm_head.weight", model.lm_head[:99]),
        ("model.text_model.norm.weight", model.text.norm.weight),
    ):
        assert torch.equal(dict(oracle.named_parameters())[name].bfloat16(), ours)


def test_padding_rows_are_zero_and_never_chosen(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = load_checkpoint(tmp_path)
    vocab = model.config.text.vocab_size
    assert model.lm_head.shape[0] == 128
    assert not model.lm_head[vocab:].any()
    assert not model.text.embedding[vocab:].any()


def test_head_saved_beside_a_tied_embedding_is_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TIED)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_checkpoint(tmp_path)
    assert model.lm_head is model.text.embedding


def damage(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.text_model.layers.0.self_attn.k_proj.weight"
    match change:
        case "missing":
            del tensors[name]
        case "extra":
            tensors["model.text_model.extra"] = torch.zeros(1)
        case "shape":
            tensors[name] = tensors[name][:-1].clone()
        case "transposed":
            tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
        case "type":
            tensors[name] = tensors[name].int()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "tensors are missing: model.text_model.layers.0.self_attn.k_proj.weight"),
        ("extra", "tensors are not part of this model: model.text_model.extra"),
        ("shape", r"k_proj.weight' must have shape \(32, 64\), got \(31, 64\)"),
        ("transposed", r"'lm_head.weight' must have shape \(99, 64\), got \(64, 99\)"),
        ("type", "k_proj.weight' must be F64, F32, F16, BF16, got I32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: str, message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_missing_or_broken_files_are_refused(tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_checkpoint(tmp_path)
    oracle.save_pretrained(tmp_path, max_shard_size=40_000)
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(CheckpointError, match="weight files are missing"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="of this folder, got"):
        load_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_checkpoint(tmp_path)


def test_saving_replaces_earlier_files(tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    model = load_checkpoint(tmp_path)
    for number, shard_bytes in enumerate((40_000, 10**9, 40_000)):
        with torch.no_grad():
            model.text.norm.weight.fill_(number)
        save_checkpoint(model, tmp_path, config_from=tmp_path, max_shard_bytes=shard_bytes)
        assert torch.equal(load_checkpoint(tmp_path).text.norm.weight, model.text.norm.weight)
        back = Idefics2ForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(back.model.text_model.norm.weight, model.text.norm.weight)
    assert len(oracle.state_dict()) == len(hub_tensors(model.config))
    save_checkpoint(model, tmp_path / "copy", config_from=tmp_path)
    assert (tmp_path / "copy" / "chat_template.jinja").exists()
