"""Image settings in a file of their own, or in ``processor_config.json`` as in transformers 5."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from huggingface_hub import constants

from hub_cache import write_snapshot
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.errors import ConfigError
from idefics2_engine.images.tiling import ImageConfig
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from oracle import random_image
from paths import EIGHT_B
from tiny_checkpoint import LATENTS, edit_json, write_checkpoint

OURS = {"size": {"longest_edge": 84, "shortest_edge": 70}, "do_image_splitting": True}
OLD = {"size": {"longest_edge": 112, "shortest_edge": 42}, "image_mean": [0.4, 0.5, 0.6]}
TYPE = {"image_processor_type": "Idefics2ImageProcessor"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def assert_same_settings(ours: ImageConfig, theirs: Any) -> None:
    assert ours.longest_edge == theirs.size["longest_edge"]
    assert ours.shortest_edge == theirs.size["shortest_edge"]
    assert ours.split is theirs.do_image_splitting
    assert (ours.mean, ours.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (ours.resample, ours.rescale_factor) == (theirs.resample, theirs.rescale_factor)


ABSENT = object()
AutoImageProcessor: Any = transformers.AutoImageProcessor
AutoProcessor: Any = transformers.AutoProcessor


@pytest.mark.parametrize("old", [OLD | TYPE, ABSENT], ids=["old file", "no old file"])
@pytest.mark.parametrize(
    "nested",
    [OURS | TYPE, TYPE, {}, None, ABSENT, [], [OURS], "x"],
    ids=["nested", "only a type", "empty", "null", "not nested", "list", "list of one", "text"],
)
def test_settings_are_read_where_transformers_reads_them(
    nested: Any, old: Any, tmp_path: Path
) -> None:
    values = {"image_seq_len": 64, "processor_class": "Idefics2Processor"}
    if nested is not ABSENT:
        values["image_processor"] = nested
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    if old is not ABSENT:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    shutil.copy(EIGHT_B / "config.json", tmp_path)
    try:
        theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    except (OSError, AttributeError, TypeError, ValueError):
        with pytest.raises(ConfigError, match=r"processor_config\.json"):
            ImageConfig.load(tmp_path)
    else:
        assert_same_settings(ImageConfig.load(tmp_path), theirs)


def test_errors_name_their_file(tmp_path: Path) -> None:
    """Errors that depend on the model are found later, and name the file as well."""
    write_checkpoint(tmp_path)
    path = tmp_path / "processor_config.json"
    large = {"size": {"longest_edge": 9800, "shortest_edge": 42}}
    for nested, said in (
        ({"resample": 99}, f"{path}: image_processor: resample must be the number of a"),
        (large, f"{path}: image_processor: size must give every side 1 to 8 patches of 14 pixels"),
        ([1], f"{path}: image_processor must be an object, got [1]"),
    ):
        edit_json(path, image_processor=nested)
        with pytest.raises(ConfigError) as caught:
            Processor.load(tmp_path, ModelConfig.load(tmp_path))
        assert str(caught.value).startswith(said)


def save_by_transformers(folder: Path) -> Any:
    """Let transformers 5 save the processor of ``folder``.

    Its settings differ from those in the old file.
    """
    processor = AutoProcessor.from_pretrained(folder, backend="pil", image_seq_len=LATENTS, **OURS)
    processor.save_pretrained(folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["image_processor"]["size"] == OURS["size"]
    return processor


@pytest.mark.parametrize("keep_old", [False, True], ids=["alone", "beside the old file"])
def test_processor_saved_by_transformers_5_is_read(keep_old: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    theirs = save_by_transformers(tmp_path)
    if not keep_old:
        (tmp_path / "preprocessor_config.json").unlink()
    ours = Processor.load(tmp_path, ModelConfig.load(tmp_path))
    assert_same_settings(ours.image_config, theirs.image_processor)
    image = random_image(90, 60)
    got = ours.padded(["<image>What?"], [[image]])
    wanted = theirs(text=["<image>What?"], images=[[image]], padding=True)
    np.testing.assert_array_equal(got["input_ids"], wanted["input_ids"])
    np.testing.assert_array_equal(got["pixel_values"], wanted["pixel_values"])
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}]
    text = theirs.apply_chat_template(turns, add_generation_prompt=True)
    assert ours.chat(turns).token_ids == ours.prompt(text, [image]).token_ids


def answer(model: Path | str, **options: Any) -> list[int]:
    llm = LLM(model, device="cpu", dtype="float32", **options)
    prompt = {"prompt": "<image>What?", "multi_modal_data": {"image": random_image(90, 60)}}
    return [*llm.generate(prompt, GREEDY)[0].outputs[0].token_ids]


def test_answers_are_the_same_for_folder_hub_and_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flat, lora = tmp_path / "nested", tmp_path / "flat", tmp_path / "lora"
    oracle = write_checkpoint(folder)
    save_by_transformers(folder)
    shutil.copytree(folder, flat)
    values = json.loads((flat / "processor_config.json").read_text())
    (flat / "preprocessor_config.json").write_text(json.dumps(values["image_processor"]))
    edit_json(flat / "processor_config.json", image_processor=None)
    (folder / "preprocessor_config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained: Any = peft.get_peft_model(
            oracle, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        trained.save_pretrained(str(lora))
    # Trainers save this file beside an adapter
    shutil.copy(folder / "processor_config.json", lora)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_snapshot(tmp_path / "hub", "org/nested", files)
    plain, adapted = answer(flat), answer(flat, adapter=lora)
    assert plain != adapted
    assert answer(folder) == answer("org/nested") == plain
    assert answer(folder, adapter=lora) == answer("org/nested", adapter=lora) == adapted


def test_saved_files_are_readable_by_every_release(tmp_path: Path) -> None:
    """Releases up to 4.46 read the old file only, and fail on settings in the new one."""
    source, target = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source)
    save_by_transformers(source)
    for keep_old in (True, False):
        if not keep_old:
            (source / "preprocessor_config.json").unlink()
        save_checkpoint(load_checkpoint(source), target, config_from=source)
        assert (
            json.loads((target / "preprocessor_config.json").read_text())
            == (json.loads((source / "processor_config.json").read_text())["image_processor"])
        )
        values = json.loads((target / "processor_config.json").read_text())
        assert values == {"image_seq_len": LATENTS, "processor_class": "Idefics2Processor"}
        assert ImageConfig.load(target) == ImageConfig.load(source)
        theirs = AutoProcessor.from_pretrained(target, backend="pil")
        assert_same_settings(ImageConfig.load(target), theirs.image_processor)
        shutil.rmtree(target)


def test_saving_into_the_same_folder_keeps_its_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    save_by_transformers(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    save_checkpoint(load_checkpoint(tmp_path), tmp_path, config_from=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")} == before
