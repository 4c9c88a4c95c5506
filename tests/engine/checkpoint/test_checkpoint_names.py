"""Tensor names and the tied head: transformers' result, or an error."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Idefics2ForConditionalGeneration

from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import CheckpointError
from idefics2_engine.hf.padded_forward import forward_padded
from oracle import TinyCase, build_oracle, padded_pixels, save_oracle

CASE = TinyCase(
    "one-layer",
    (((28, 42),),),
    (6,),
    vision={"num_hidden_layers": 1},
    perceiver={"resampler_depth": 1},
    text={"num_hidden_layers": 1},
)
EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"
# None means that the key is absent
FLAGS = (None, True, False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = save_oracle(build_oracle(CASE), tmp_path_factory.mktemp("pristine"))
    return load_file(folder / "model.safetensors")


@cache
def inputs() -> dict[str, Tensor]:
    ids = torch.tensor(CASE.token_ids())
    pixels, mask = padded_pixels(CASE.make_tiles())
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def write(
    folder: Path, tensors: dict[str, Tensor], top: bool | None = None, text: bool | None = None
) -> Path:
    """Write a checkpoint of ``tensors`` whose config has ``tie_word_embeddings`` in two places."""
    config = json.loads(CASE.config().to_json_string())
    for section, flag in ((config, top), (config["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        if flag is not None:
            section["tie_word_embeddings"] = flag
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_in_transformers(folder: Path) -> tuple[Any, set[str]]:
    """Load ``folder`` in transformers; return the model and the names of its missing tensors."""
    model: Any
    from_pretrained: Any = Idefics2ForConditionalGeneration.from_pretrained
    model, info = from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return model, info["missing_keys"]


def assert_same_logits(folder: Path) -> None:
    oracle, missing = load_in_transformers(folder)
    assert not missing
    with torch.no_grad():
        wanted = oracle(**inputs()).logits
        got = forward_padded(load_checkpoint(folder), **inputs()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def present(pristine: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """Return the checkpoint's tensors with the embedding, the head, or both, as ``which`` says."""
    rest = {name: tensor for name, tensor in pristine.items() if name not in (EMBEDDING, HEAD)}
    embedding, head = pristine[EMBEDDING], pristine[HEAD]
    return (
        rest
        | {
            "both, different": {EMBEDDING: embedding, HEAD: head},
            "both, one value apart": {EMBEDDING: embedding, HEAD: one_apart(embedding)},
            "both, equal": {EMBEDDING: embedding, HEAD: embedding.clone()},
            "both, equal in two types": {
                EMBEDDING: embedding.half(),
                HEAD: embedding.half().float(),
            },
            "the embedding": {EMBEDDING: embedding},
            "the head": {HEAD: head},
            "none": {},
        }[which]
    )


def one_apart(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] += 1
    return changed


PRESENT = (
    "both, different", "both, one value apart", "both, equal", "both, equal in two types",
    "the embedding", "the head", "none",
)  # fmt: skip


@pytest.mark.parametrize("which", PRESENT)
@pytest.mark.parametrize("text", FLAGS)
@pytest.mark.parametrize("top", FLAGS)
def test_head_is_loaded_as_in_transformers(
    top: bool | None, text: bool | None, which: str, pristine: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write(tmp_path, present(pristine, which), top, text)
    oracle, missing = load_in_transformers(folder)
    # transformers draws these at random
    if missing:
        with pytest.raises(CheckpointError, match="tensors are missing") as caught:
            load_checkpoint(folder)
        first = EMBEDDING if top else min(missing, key=len)
        assert first in str(caught.value)
        return
    model = load_checkpoint(folder)
    is_tied = oracle.lm_head.weight is oracle.model.text_model.embed_tokens.weight
    assert (model.lm_head is model.text.embedding) == is_tied
    assert model.config.tie_word_embeddings == is_tied
    with torch.no_grad():
        got, wanted = forward_padded(model, **inputs()).logits, oracle(**inputs()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_head_tied_only_in_the_text_config_is_an_error(
    pristine: dict[str, Tensor], tmp_path: Path
) -> None:
    write(tmp_path, present(pristine, "the embedding"), text=True)
    with pytest.raises(CheckpointError, match=r"true at the top level of config\.json"):
        load_checkpoint(tmp_path)


def test_tied_head_of_another_shape_is_refused(pristine: dict[str, Tensor], tmp_path: Path) -> None:
    shorter = {HEAD: pristine[EMBEDDING][:-1].clone()}
    write(tmp_path, pristine | shorter, top=True)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must have shape \(99, 64\)"):
        load_checkpoint(tmp_path)


def test_head_in_another_shard_is_loaded(pristine: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, {}, top=True)
    (tmp_path / "model.safetensors").unlink()
    weight_map = dict.fromkeys(pristine, "a.safetensors") | {HEAD: "b.safetensors"}
    rest = {name: tensor for name, tensor in pristine.items() if name != HEAD}
    save_file(rest, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({HEAD: pristine[HEAD]}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_logits(tmp_path)


def test_saved_config_records_whether_the_head_is_tied(
    pristine: dict[str, Tensor], tmp_path: Path
) -> None:
    """Releases of transformers that tie without comparing the tensors then keep both as well."""
    source = write(tmp_path / "in", pristine, top=True)
    save_checkpoint(load_checkpoint(source), tmp_path / "out", config_from=source)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    oracle, missing = load_in_transformers(tmp_path / "out")
    assert not missing
    assert torch.equal(oracle.lm_head.weight, pristine[HEAD])
    assert_same_logits(tmp_path / "out")

    source = write(tmp_path / "head", present(pristine, "the head"), top=True)
    save_checkpoint(load_checkpoint(source), tmp_path / "embedding", config_from=source)
    assert HEAD not in load_file(tmp_path / "embedding" / "model.safetensors")
    assert_same_logits(tmp_path / "embedding")


def respelled(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    rotary = "self_attn.rotary_emb.inv_freq"
    match how:
        case "without the prefix":
            return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        case "some without the prefix":
            return {
                name.removeprefix("model.") if i % 2 else name: tensor
                for i, (name, tensor) in enumerate(tensors.items())
            }
        case "prefix twice":
            return {f"model.{name}": tensor for name, tensor in tensors.items()}
        case "rotary buffers":
            return tensors | {
                f"model.text_model.layers.0.{rotary}": torch.ones(8),
                f"text_model.layers.7.{rotary}": torch.ones(3, dtype=torch.int64),
                "model.text_model.rotary_emb.inv_freq": torch.ones(()),
            }
    raise AssertionError(how)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "how", ["without the prefix", "some without the prefix", "prefix twice", "rotary buffers"]
)
def test_names_of_other_releases_are_accepted(
    how: str, tied: bool, pristine: dict[str, Tensor], tmp_path: Path
) -> None:
    """transformers' ``Idefics2Model`` has no head and saves the tied case without the prefix."""
    tensors = present(pristine, "the embedding") if tied else pristine
    assert_same_logits(write(tmp_path, respelled(tensors, how), top=tied))


def test_errors_use_the_files_tensor_names(pristine: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = respelled(pristine, "without the prefix")
    tensors["text_model.norm.weight"] = torch.zeros(3)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"tensor 'text_model.norm.weight' must have shape"):
        load_checkpoint(tmp_path)


def test_two_names_of_one_tensor_are_refused(pristine: dict[str, Tensor], tmp_path: Path) -> None:
    """One of the two tensors would be dropped silently."""
    write(tmp_path, pristine | {EMBEDDING.removeprefix("model."): pristine[EMBEDDING] + 1})
    with pytest.raises(CheckpointError, match="are the same one of this model") as caught:
        load_checkpoint(tmp_path)
    assert EMBEDDING.removeprefix("model.") in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["module.lm_head.weight", "model.text_model.inv_freq", "model.vision_model.position_ids"],
)
def test_unknown_names_are_refused(name: str, pristine: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, pristine | {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"are not part of this model: {name}"):
        load_checkpoint(tmp_path)
