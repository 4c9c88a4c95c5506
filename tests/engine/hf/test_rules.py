"""The trained rules and transformers', in ``forward``, in transformers' loop and on the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.idefics2 import modeling_idefics2

from hf_models import build_peer, kept_logits
from idefics2_engine.hf import Idefics2ForConditionalGeneration
from idefics2_engine.hf.padded_forward import forward_padded
from idefics2_engine.hf.rules import patch_positions
from idefics2_engine.images.tiling import position_ids
from oracle import IMAGE_TOKEN, LATENTS, PATCH, TinyCase, build_oracle

# (height, width) in pixels: an A4 page has 70 x 49 patches, and a strip of it 2 x 49
A4, STRIP = (980, 686), (28, 686)
PAGE = TinyCase(
    "page", ((A4,),), (6,), vision={"image_size": 980}, perceiver={"rms_norm_eps": 1e-6}
)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def page(size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(1, 1, 3, *size, generator=generator)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * LATENTS, 6, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(1, 1, *size, dtype=torch.int64),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config lacks the perceiver's epsilon, and whose features depend on it."""
    folder = tmp_path_factory.mktemp("page")
    peer = build_peer(PAGE)
    with torch.no_grad():
        # Small features, so that epsilon matters
        peer.model.connector.perceiver_resampler.latents.mul_(1e-3)
        peer.model.vision_model.embeddings.position_embedding.weight.mul_(8)
    peer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["perceiver_config"].pop("rms_norm_eps", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    library: Any = Idefics2ForConditionalGeneration
    return library.from_pretrained(folder, **arguments)


def peer_of(folder: Path) -> Any:
    library: Any = transformers.Idefics2ForConditionalGeneration
    return library.from_pretrained(folder, attn_implementation="sdpa")


def tokens(model: Any, backend: str, size: tuple[int, int]) -> list[list[int]]:
    model.generation_backend = backend
    out: list[list[int]] = model.generate(**page(size), **GREEDY).tolist()
    return out


class TestOneObjectAgreesWithItself:
    @pytest.mark.parametrize(
        "size", [pytest.param(A4, marks=pytest.mark.long), STRIP], ids=["a4", "strip"]
    )
    @pytest.mark.parametrize("rules", ["trained", "transformers"])
    def test_page(self, rules: Any, size: tuple[int, int], checkpoint: Path) -> None:
        model = load(checkpoint, rules=rules)
        logits = kept_logits(model, page(size))
        last = int(logits[-1].argmax())
        assert tokens(model, "engine", size) == tokens(model, "transformers", size)
        assert tokens(model, "engine", size)[0][page(size)["input_ids"].shape[1]] == last
        packed = model.engine.engine.runner.model
        if rules == "trained":
            with torch.no_grad():
                wanted = forward_padded(packed, **page(size)).logits[0]
        else:
            wanted = kept_logits(peer_of(checkpoint), page(size))
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    def test_the_rules_differ(self, checkpoint: Path) -> None:
        model = load(checkpoint)
        assert model.rules == "trained"
        trained = kept_logits(model, page(STRIP))
        model.rules = "transformers"
        theirs = kept_logits(model, page(STRIP))
        assert (trained - theirs).abs().max() > 1e-3
        # The engine follows a switch
        assert tokens(model, "engine", STRIP) == tokens(model, "transformers", STRIP)
        model.rules = "trained"
        assert torch.equal(kept_logits(model, page(STRIP)), trained)
        assert tokens(model, "engine", STRIP) == tokens(model, "transformers", STRIP)


class TestEpsilon:
    def test_a_config_without_it(self, checkpoint: Path) -> None:
        assert load(checkpoint).config.perceiver_config.rms_norm_eps == 1e-5
        model = load(checkpoint, rules="transformers")
        assert model.config.perceiver_config.rms_norm_eps == 1e-6

    def test_a_config_with_it(self, checkpoint: Path, tmp_path: Path) -> None:
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["perceiver_config"]["rms_norm_eps"] = 1e-6
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load(tmp_path).config.perceiver_config.rms_norm_eps == 1e-6

    def test_files_keep_the_trained_one(self, checkpoint: Path, tmp_path: Path) -> None:
        load(checkpoint).save_pretrained(tmp_path)
        assert load(tmp_path, rules="transformers").config.perceiver_config.rms_norm_eps == 1e-5


def embeddings_of(case: TinyCase) -> Any:
    config: Any = case.config()
    return modeling_idefics2.Idefics2VisionEmbeddings(config.vision_config)


class TestPositions:
    @pytest.mark.parametrize("count", range(1, 71))
    def test_trained(self, count: int) -> None:
        embeddings = embeddings_of(PAGE)
        embeddings.rules = "trained"
        kept = torch.zeros(1, 70, 70, dtype=torch.bool)
        kept[0, :count, :7] = True
        got = patch_positions(embeddings, kept, torch.bfloat16).view(70, 70)
        assert got[:count, :7].flatten().tolist() == position_ids(count, 7, 70).tolist()
        assert not got[count:].any()

    def test_transformers_are_those_that_its_embeddings_look_up(self) -> None:
        embeddings: Any = build_oracle(PAGE).model.vision_model.embeddings
        seen = []
        embeddings.position_embedding.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        pixels = torch.randn(2, 3, 40 * PATCH, 58 * PATCH)
        kept = torch.ones(2, 40, 58, dtype=torch.bool)
        kept[1, 30:], kept[1, :, 49:] = False, False
        embeddings(pixels, kept)
        assert torch.equal(patch_positions(embeddings, kept, torch.float32), seen[0])

    def test_larger_images_than_trained_ones(self) -> None:
        embeddings = embeddings_of(PAGE)
        kept = torch.ones(1, 71, 2, dtype=torch.bool)
        theirs = patch_positions(embeddings, kept, torch.float32)
        embeddings.rules = "trained"
        assert torch.equal(patch_positions(embeddings, kept, torch.float32), theirs)


def test_other_rules_are_named(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="rules must be 'trained' or 'transformers', got 'mine'"):
        load(checkpoint, rules="mine")
