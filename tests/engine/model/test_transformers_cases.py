"""transformers' own tests of its Idefics2 processor and image processor, applied to this package.

Each docstring names the case of ``tests/models/idefics2`` in transformers that a test mirrors, and
intended differences. Pictures are drawn, not downloaded, and smaller: the longest side is 98 pixels
instead of 980.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import Idefics2Processor, LlamaTokenizer
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from idefics2_engine.errors import ImageError, PromptError
from idefics2_engine.images.tiling import ImageConfig, position_ids
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from oracle import random_image
from paths import EIGHT_B

BOS, FAKE, IMAGE = 1, 32000, 32001
SEQ_LEN = 2
LONGEST, SHORTEST = 98, 42
ONE, TWO, THREE = random_image(160, 107, 1), random_image(130, 87, 2), random_image(128, 100, 3)
FIRST, SECOND = "In this image, we see", "bla, bla"
TEXTS = [f"<image>{FIRST}", f"{SECOND}<image><image>"]
SPLIT = pytest.mark.parametrize("split", [False, True])


@cache
def engine_processor(split: bool) -> Processor:
    loaded = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split)
    image_config = replace(loaded.image_config, longest_edge=LONGEST, shortest_edge=SHORTEST)
    return replace(loaded, image_config=image_config, image_seq_len=SEQ_LEN)


@cache
def transformers_processor(split: bool) -> Any:
    settings = json.loads((EIGHT_B / "preprocessor_config.json").read_text())
    for key in ("processor_class", "image_processor_type"):
        del settings[key]
    settings |= {
        "do_image_splitting": split,
        "size": {"longest_edge": LONGEST, "shortest_edge": SHORTEST},
    }
    return Idefics2Processor(
        Idefics2ImageProcessorPil(**settings),
        LlamaTokenizer.from_pretrained(EIGHT_B),
        image_seq_len=SEQ_LEN,
        chat_template=json.loads((EIGHT_B / "processor_config.json").read_text())["chat_template"],
    )


def words(text: str) -> list[int]:
    """Return the ids of ``text`` without ``<s>``."""
    return engine_processor(False).tokenizer.encode(text, add_bos=False)


def slots(images: int, split: bool) -> list[int]:
    """Return the ids of consecutive images; ``images`` is their number."""
    return [FAKE, *[IMAGE] * SEQ_LEN] * images * (5 if split else 1) + [FAKE]


def assert_equal(got: dict[str, npt.NDArray[Any]], wanted: Any) -> None:
    """Compare names and values with transformers' output."""
    assert got.keys() == dict(wanted).keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], np.asarray(array), err_msg=name)


@SPLIT
def test_interleaved_single(split: bool) -> None:
    """Mirror ``test_process_interleaved_images_prompts_[no_]image_splitting``: one image and text.

    This package has no call with an image alone, because the prompt has to hold the placeholder.
    """
    tiles = 5 if split else 1
    for text, after in (("<image>", []), (TEXTS[0], words(FIRST))):
        prompt = engine_processor(split).prompt(text, ONE)
        assert prompt.token_ids == [BOS, *slots(1, split), *after]
        got = engine_processor(split).padded([text], [[ONE]])
        assert got["input_ids"].tolist() == [prompt.token_ids]
        assert got["attention_mask"].tolist() == [[1] * len(prompt.token_ids)]
        assert got["pixel_values"].shape == (1, tiles, 3, 65, 98)
        assert got["pixel_attention_mask"].shape == (1, tiles, 65, 98)
        assert_equal(
            got, transformers_processor(split)(text=text, images=ONE, padding_side="right")
        )
    alone = transformers_processor(split)(images=ONE)
    np.testing.assert_array_equal(got["pixel_values"], alone["pixel_values"])


@SPLIT
def test_interleaved_batch(split: bool) -> None:
    """Mirror the batch of ``test_process_interleaved_images_prompts_[no_]image_splitting``."""
    images = [[ONE], [TWO, THREE]]
    got = engine_processor(split).padded(TEXTS, images, padding_side="left")
    first = [BOS, *slots(1, split), *words(FIRST)]
    second = [BOS, *words(SECOND), *slots(2, split)]
    missing = len(second) - len(first)
    padding, cut = [0] * missing, max(-missing, 0)
    assert got["input_ids"].tolist() == [padding + first, [0] * cut + second]
    assert got["attention_mask"].tolist() == [
        padding + [1] * len(first),
        [0] * cut + [1] * len(second),
    ]
    tiles = 5 if split else 1
    assert got["pixel_values"].shape == (2, 2 * tiles, 3, 76, 98)
    mask = got["pixel_attention_mask"]
    assert mask.shape == (2, 2 * tiles, 76, 98)
    whole = [mask[0, tiles - 1], mask[0, -1], mask[1, tiles - 1], mask[1, -1]]
    assert [int(m.sum()) for m in whole] == [65 * 98, 0, 65 * 98, 76 * 98]
    assert_equal(
        got,
        transformers_processor(split)(text=TEXTS, images=images, padding=True, padding_side="left"),
    )


def test_published_sizes() -> None:
    """Mirror the shapes of ``test_process_interleaved_images_prompts_no_image_splitting``.

    They are (653, 980) there.
    """
    processor = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), split=False)
    prompt = processor.prompt("<image>", random_image(1600, 1067))
    assert [tile.pixels.shape for tile in prompt.tiles] == [(653, 980, 3)]
    assert prompt.token_ids == [BOS, FAKE, *[IMAGE] * 64, FAKE]


@SPLIT
def test_add_special_tokens(split: bool) -> None:
    """Mirror ``test_add_special_tokens_processor``.

    This package has no such switch. A raw prompt begins with ``<s>``. A prompt without it is passed
    as token ids.
    """
    text = f"{FIRST}<image>"
    bare = words(FIRST) + slots(1, split)
    assert engine_processor(split).prompt(text, ONE).token_ids == [BOS, *bare]
    assert transformers_processor(split)(text=text, images=ONE)["input_ids"] == [[BOS, *bare]]
    assert transformers_processor(split)(text=text, images=ONE, add_special_tokens=False)[
        "input_ids"
    ] == [bare]
    without = engine_processor(split).token_prompt(bare, ONE)
    assert (without.token_ids, len(without.tiles)) == (bare, 5 if split else 1)


@SPLIT
def test_non_nested_images_with_batched_text(split: bool) -> None:
    """Mirror ``test_non_nested_images_with_batched_text``: all images in one list, in order."""
    got = engine_processor(split).padded(TEXTS, [ONE, TWO, THREE])
    assert got["pixel_values"].shape == (2, 10 if split else 2, 3, 76, 98)
    assert got["pixel_attention_mask"].shape == (2, 10 if split else 2, 76, 98)
    assert_equal(got, engine_processor(split).padded(TEXTS, [[ONE], [TWO, THREE]]))
    wanted = transformers_processor(split)(
        text=TEXTS, images=[ONE, TWO, THREE], padding=True, padding_side="right"
    )
    assert_equal(got, wanted)


NO_SLOT = ["This is a test sentence.", "In this other sentence we try some good things"]
TWO_SLOTS = [f"{text}<image>" for text in NO_SLOT]
ONE_SLOT = [NO_SLOT[0], TWO_SLOTS[1]]
WRONG_COUNTS: list[tuple[list[str], list[Any], str]] = [
    (NO_SLOT, [[ONE], [TWO]], "wanted 1, got 0"),
    (NO_SLOT, [[ONE], []], "wanted 1, got 0"),
    (TWO_SLOTS, [[ONE], [TWO, THREE]], "wanted 2, got 1"),
    (TWO_SLOTS, [[], [TWO]], "wanted 0, got 1"),
    (TWO_SLOTS, [ONE, TWO, THREE], "wanted 2, got 3"),
    (TWO_SLOTS, [ONE], "wanted 2, got 1"),
    (ONE_SLOT, [[ONE], []], "wanted 1, got 0"),
    (ONE_SLOT, [ONE, TWO], "wanted 1, got 2"),
]


@SPLIT
@pytest.mark.parametrize(("texts", "images", "message"), WRONG_COUNTS)
def test_wrong_image_counts(texts: list[str], images: list[Any], message: str, split: bool) -> None:
    """Mirror ``test_process_interleaved_images_prompts_image_error``.

    These are its eight calls with wrong counts.
    """
    with pytest.raises(ValueError, match="number of"):
        transformers_processor(split)(text=texts, images=images, padding=True)
    with pytest.raises(PromptError, match=message):
        engine_processor(split).padded(texts, images)


@SPLIT
@pytest.mark.parametrize("images", [[[], [TWO]], [TWO]], ids=["nested", "flat"])
def test_batch_may_mix_texts_with_and_without_images(images: list[Any], split: bool) -> None:
    """Differ from two calls of that test whose counts are right, where transformers once raised.

    In a batch a row without images is valid and has no tile in its mask. transformers 5 agrees.
    """
    got = engine_processor(split).padded(ONE_SLOT, images)
    assert got["input_ids"][0].tolist()[: len(words(NO_SLOT[0])) + 1] == [BOS, *words(NO_SLOT[0])]
    assert got["pixel_attention_mask"][0].sum() == 0
    assert got["pixel_attention_mask"][1, -1].sum() == 65 * 98
    wanted = transformers_processor(split)(
        text=ONE_SLOT, images=images, padding=True, padding_side="right"
    )
    assert_equal(got, wanted)
    (alone,) = engine_processor(split).padded([ONE_SLOT[1]], [[TWO]])["pixel_values"]
    np.testing.assert_array_equal(got["pixel_values"][1], alone)


@SPLIT
def test_counts_of_a_single_prompt(split: bool) -> None:
    """Differ where transformers accepts placeholders without images, which are an error here."""
    assert transformers_processor(split)(text="<image>")["input_ids"]
    for text, images in (("<image>", []), ("<image><image>", [ONE]), ("a", [ONE]), ("", ONE)):
        with pytest.raises(PromptError, match="must have one <image> for each image"):
            engine_processor(split).prompt(text, images)
    nothing: Any = None
    with pytest.raises(PromptError, match="images: must be a list of images, got None"):
        engine_processor(split).prompt("<image>", nothing)


def test_neither_text_nor_images() -> None:
    """Mirror the error of ``Idefics2Processor.__call__`` without arguments.

    A list without text is an error as well.
    """
    nothing: Any = None
    for text in (None, [7], 7):
        with pytest.raises(ValueError, match=r"provide|Invalid input text"):
            transformers_processor(False)(text=text)
    for not_texts in (None, 7, "a"):
        with pytest.raises(PromptError, match="texts: must be a list of strings"):
            engine_processor(False).padded(not_texts, [[]])  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"texts\[0\]: must be a string, got int"):
        engine_processor(False).padded([7], [[]])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="text: must be a string, got None"):
        engine_processor(False).prompt(nothing)
    with pytest.raises(PromptError, match="one list for each of 1 texts"):
        engine_processor(False).padded(["a"], [])


@SPLIT
def test_apply_chat_template(split: bool) -> None:
    """Mirror ``test_apply_chat_template``, and its older form with the images expanded.

    A bare string among the parts of a message is an error here. The template drops it in
    transformers.
    """
    question = {"type": "text", "text": "What do these images show?"}
    answer = "The first image shows the statue of Liberty in New York. The second one Idefix."
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [question, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": "And who is that?"}]},
    ]
    wanted = (
        "User: What do these images show?<image><image><end_of_utterance>\n"
        f"Assistant: {answer}<end_of_utterance>\n"
        "User: And who is that?<end_of_utterance>\n"
        "Assistant:"
    )
    got = engine_processor(split).chat(messages, [ONE, TWO])
    assert got.prompt == wanted
    assert (
        transformers_processor(split).apply_chat_template(messages, add_generation_prompt=True)
        == wanted
    )
    tile = "<fake_token_around_image><image><image>"
    expanded = tile * (10 if split else 2) + "<fake_token_around_image>"
    decoded = engine_processor(split).tokenizer.decode(got.token_ids, skip_special_tokens=False)
    assert decoded == "<s> " + wanted.replace("<image><image>", expanded)
    assert len(got.tiles) == (10 if split else 2)

    messages[0]["content"].append("What do these images show?")
    assert (
        transformers_processor(split).apply_chat_template(messages, add_generation_prompt=True)
        == wanted
    )
    with pytest.raises(PromptError, match=r"messages\[0\]: content\[3\]: must be a text, image"):
        engine_processor(split).chat(messages, [ONE, TWO])


@SPLIT
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Initial str<image><image>mid str<image>", "Initial strFIIFIIF mid strFIIF"),
        ("<image><image>", "FIIFIIF"),
        ("Initial str", "Initial str"),
    ],
)
def test_build_string_from_input(text: str, wanted: str, split: bool) -> None:
    """Mirror ``test_build_string_from_input`` of the first release.

    Since transformers 5 a space separates an image from the next word, as in training.
    """
    ids = engine_processor(split).prompt(text, [ONE] * text.count("<image>")).token_ids
    decoded = engine_processor(split).tokenizer.decode(ids, skip_special_tokens=False)
    short = decoded.replace("<fake_token_around_image>", "F").replace("<image>", "I")
    wanted = wanted.replace("FII", "FII" * (5 if split else 1))
    assert short == "<s>" + ("" if wanted.startswith("F") else " ") + wanted
    assert [ids] == transformers_processor(split)(text=text)["input_ids"]


# Tests of the image processor


def batch(count: int = 7) -> list[npt.NDArray[np.uint8]]:
    """Draw images of random sizes, as ``prepare_image_inputs`` does."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 200, (count, 2))
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def expected_size(height: int, width: int) -> tuple[int, int]:
    """Return the size that ``get_expected_values`` computes.

    The longest edge is bounded first, then the shortest.
    """
    scale = min(1, LONGEST / max(height, width))
    if scale < 1:
        long, short = LONGEST, int(LONGEST * min(height, width) / max(height, width) + 1e-9)
        height, width = (long, short) if height > width else (short, long)
    return max(height, SHORTEST), max(width, SHORTEST)


@SPLIT
@pytest.mark.parametrize("kind", ["numpy", "pil", "pytorch"])
def test_call(kind: str, split: bool) -> None:
    """Mirror ``test_call_numpy``, ``test_call_pil`` and ``test_call_pytorch``.

    Values are compared as well as shapes. An array has its channels last, a tensor first.
    """
    arrays = batch()
    images: list[Any]
    match kind:
        case "numpy":
            images = [*arrays]
        case "pil":
            images = [Image.fromarray(array) for array in arrays]
        case _:
            images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    tiles = 5 if split else 1
    one = engine_processor(split).padded(["<image>"], [images[:1]])["pixel_values"]
    assert one.shape[:3] == (1, tiles, 3)
    assert one.shape[3:] >= expected_size(*arrays[0].shape[:2])
    assert one.dtype == np.float32

    every = engine_processor(split).padded(["<image>"] * len(images), [[image] for image in images])
    sizes = [expected_size(*array.shape[:2]) for array in arrays]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    assert every["pixel_values"].shape == (len(images), tiles, 3, height, width)
    # The mask of the whole images
    mask = every["pixel_attention_mask"][:, -1]
    assert [(int(m.any(1).sum()), int(m.any(0).sum())) for m in mask] == sizes
    wanted = transformers_processor(split).image_processor(
        [[Image.fromarray(array)] for array in arrays], return_tensors="np"
    )
    np.testing.assert_array_equal(every["pixel_values"], wanted["pixel_values"])
    np.testing.assert_array_equal(every["pixel_attention_mask"], wanted["pixel_attention_mask"])


@SPLIT
def test_call_numpy_4_channels(split: bool) -> None:
    """Differ from ``test_call_numpy_4_channels``, where four channels reach a model of three.

    Here there are always three: the colors of an image with alpha, as in transformers'
    ``load_image``.
    """
    arrays = batch(3)
    opacity = [np.full((*array.shape[:2], 1), 128, np.uint8) for array in arrays]
    images = [
        Image.fromarray(np.concatenate(pair, axis=2)) for pair in zip(arrays, opacity, strict=True)
    ]
    assert {image.mode for image in images} == {"RGBA"}
    got = engine_processor(split).padded(["<image>"] * 3, [[image] for image in images])
    assert got["pixel_values"].shape[2] == 3
    opaque = engine_processor(split).padded(["<image>"] * 3, [[array] for array in arrays])
    np.testing.assert_array_equal(got["pixel_values"], opaque["pixel_values"])
    wanted = transformers_processor(split)(
        text=["<image>"] * 3, images=[[image] for image in images], padding=True
    )
    np.testing.assert_array_equal(got["pixel_values"], wanted["pixel_values"])


def test_image_processor_properties(tmp_path: Path) -> None:
    """Mirror ``test_image_processor_properties`` and ``test_init_without_params``.

    They test the defaults of an empty file.
    """
    (tmp_path / "preprocessor_config.json").write_text("{}")
    got, wanted = ImageConfig.load(tmp_path), Idefics2ImageProcessorPil()
    assert got.longest_edge == wanted.size["longest_edge"]
    assert got.shortest_edge == wanted.size["shortest_edge"]
    assert got.split is wanted.do_image_splitting
    assert (got.mean, got.std) == (tuple(wanted.image_mean), tuple(wanted.image_std))
    assert (got.resample, got.rescale_factor) == (wanted.resample, wanted.rescale_factor)


def test_saved_image_processor_is_loaded(tmp_path: Path) -> None:
    """Mirror ``test_image_processor_from_and_save_pretrained``: transformers' files can be read."""
    transformers_processor(True).image_processor.save_pretrained(tmp_path)
    assert ImageConfig.load(tmp_path) == engine_processor(True).image_config


def test_positions_differ_from_transformers_on_two_sides() -> None:
    """Compare the trained positions of every side with transformers'.

    They differ for sides of 49 patches (an A4 page) and 58. Up to 4.54 transformers had the rule of
    the training (``tests/data``). Since then it rounds differently, and puts a patch of these sides
    into a neighboring bucket.
    """
    config = Idefics2VisionConfig(hidden_size=2, image_size=980, patch_size=14)
    embeddings = Idefics2VisionEmbeddings(config)
    seen: list[torch.Tensor] = []
    embeddings.position_embedding.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    differ = []
    for side in range(1, 71):
        for shape in ((side, 1), (1, side)):
            pixels = torch.zeros(1, 3, 14 * shape[0], 14 * shape[1])
            with torch.no_grad():
                embeddings(pixels, torch.ones(1, *shape, dtype=torch.bool))
            if seen.pop()[0].tolist() != position_ids(*shape, 70).tolist():
                differ.append(side)
    assert differ == [49, 49, 58, 58]


def test_values_that_are_not_images_are_refused() -> None:
    """Mirror the checks of ``make_nested_list_of_images``.

    A value that is not an image is an error, not a crash.
    """
    wrong: list[Any] = [None, 7, [], {}, "missing.png", b"", np.zeros((0, 3, 3), np.uint8)]
    for image in wrong:
        with pytest.raises(ImageError):
            engine_processor(False).padded(["<image>", "a"], [[image], []])
