"""The processor against transformers' ``Idefics2Processor``: ids, chats and padded batches."""

import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from transformers import Idefics2Processor, LlamaTokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.errors import ConfigError, ImageError, PromptError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.chat_template import ChatTemplate
from idefics2_engine.prompts.processor import Processor
from paths import EIGHT_B

MODEL = ModelConfig.load(EIGHT_B)
SPLIT = pytest.mark.parametrize("split", [False, True])
WORDS = [
    "<image>", "<image>", "<image><image>", "What is this?", " ", "  ", "\n", "a", "A word.",
    "<fake_token_around_image>", "<end_of_utterance>", "</s>", "<s>", "<b>", "< image >", "é漢🙂",
    "\u00a0", "User:", "\tx", "\ufdd0\ufdd1", "e\u0301", "1,234.5",
]  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def engine_processor(split: bool) -> Processor:
    return Processor.load(EIGHT_B, MODEL, split=split)


@cache
def transformers_processor(split: bool) -> Any:
    settings = json.loads((EIGHT_B / "preprocessor_config.json").read_text())
    for key in ("processor_class", "image_processor_type"):
        del settings[key]
    chat_template = json.loads((EIGHT_B / "processor_config.json").read_text())["chat_template"]
    return Idefics2Processor(
        Idefics2ImageProcessorPil(**settings | {"do_image_splitting": split}),
        LlamaTokenizer.from_pretrained(EIGHT_B),
        image_seq_len=64,
        chat_template=chat_template,
    )


def raw_prompts() -> list[str]:
    rng = random.Random(0)
    return ["", *("".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(59))]


def conversations() -> list[list[dict[str, Any]]]:
    rng = random.Random(1)
    texts = [word for word in WORDS if "<image>" not in word and "_" not in word] + ["", "<c", ">"]
    # This package keeps both of them as text
    texts = [text for text in texts if text not in ("<s>", "</s>")]
    found = []
    for _ in range(100):
        messages = []
        for turn in range(rng.randint(1, 4)):
            content: list[dict[str, Any]] = [
                {"type": "image"}
                if rng.random() < 0.3
                else {"type": "text", "text": "".join(rng.choices(texts, k=rng.randint(0, 3)))}
                for _ in range(rng.randint(1, 4))
            ]
            role = "user" if turn % 2 == 0 else "assistant"
            messages.append({"role": "system" if rng.random() < 0.1 else role, "content": content})
        found.append(messages)
    return found


@SPLIT
def test_ids_of_raw_prompts_equal_transformers(split: bool) -> None:
    prompts = raw_prompts()
    assert len(set(prompts)) >= 50
    dot = noise(2, 2)
    for text in prompts:
        wanted = transformers_processor(split)(text=text)["input_ids"][0]
        got = engine_processor(split).prompt(text, [dot] * text.count("<image>"))
        assert got.token_ids == wanted, text
        assert got.prompt == text
        assert len(got.tiles) == text.count("<image>") * (5 if split else 1)


@SPLIT
@pytest.mark.parametrize("generate", [False, True])
def test_chats_equal_transformers(split: bool, generate: bool) -> None:
    dot = noise(2, 2)
    for messages in conversations():
        rendered = transformers_processor(split).apply_chat_template(
            messages, add_generation_prompt=generate
        )
        wanted = transformers_processor(split)(text=rendered)["input_ids"][0]
        images = [dot] * rendered.count("<image>")
        got = engine_processor(split).chat(messages, images, add_generation_prompt=generate)
        assert got.prompt == rendered
        assert got.token_ids == wanted, rendered
        if split:
            assert got.token_ids.count(32001) == 320 * len(images)


def test_chat_equals_one_call_of_transformers() -> None:
    images = [noise(30, 40), noise(50, 20)]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A <b>cat</b>."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And this:"},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    wanted = transformers_processor(True).apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    got = engine_processor(True).chat(messages)
    assert got.token_ids == wanted["input_ids"][0]
    assert len(got.tiles) == 10
    # The tiles equal those of single images, in the order of the placeholders
    own = [
        tile for image in images for tile in engine_processor(True).prompt("<image>", [image]).tiles
    ]
    for tile, alone in zip(got.tiles, own, strict=True):
        np.testing.assert_array_equal(tile.pixels, alone.pixels)


@pytest.mark.parametrize(
    "source",
    [
        """
        {% for m in messages %}
            {% if loop.last %}
                {% break %}
            {% endif %}
        {{ m['role'] | upper }}
            {% for part in m['content'] %}
            {{ part['text'] | default('<image>', true) | trim }}
            {% endfor %}
        {% endfor %}
        """,
        "{{ messages | tojson(indent=2) }}{{ bos_token }}{{ eos_token }}{{ pad_token }}\n",
        "{{ messages[0].content | map(attribute='type') | list }}{{ none_such }}",
    ],
)
def test_other_templates_render_as_in_transformers(source: str) -> None:
    processor = engine_processor(False)
    for messages in conversations()[:30]:
        wanted = transformers_processor(False).apply_chat_template(messages, chat_template=source)
        marked = ChatTemplate(source, processor.tokenizer).render(messages, False)
        assert processor.tokenizer.unmark(marked) == wanted


def test_images_may_be_passed_in_every_form(tmp_path: Path) -> None:
    images = [noise(400 + n, 400) for n in range(3)]
    images[1].save(tmp_path / "one.png")
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "one.png")}}
    content = [{"type": "image"}, part, {"type": "image", "image": images[2]}]
    got = engine_processor(False).chat([{"role": "user", "content": content}], [images[0]])
    assert got.prompt == "User:<image><image><image><end_of_utterance>\nAssistant:"
    for tile, image in zip(got.tiles, images, strict=True):
        np.testing.assert_array_equal(tile.pixels, np.array(image))


def test_typed_control_tokens_do_not_count_as_slots() -> None:
    text = "<image></s><fake_token_around_image><end_of_utterance>"
    content = [{"type": "text", "text": text}, {"type": "image"}]
    got = engine_processor(False).chat([{"role": "user", "content": content}], [noise(2, 2)])
    assert got.prompt == f"User: {text}<image><end_of_utterance>\nAssistant:"
    special = [id for id in got.token_ids if id in engine_processor(False).tokenizer.control_ids]
    assert special == [1, 32000, *[32001] * 64, 32000, 32002]


BATCHES: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {
    "one": [("<image>What?", [(501, 401)])],
    "unequal sizes": [("<image>a", [(30, 50)]), ("b<image> c", [(700, 300)])],
    "unequal counts": [("<image>x<image>", [(3, 9), (500, 401)]), ("<image>", [(399, 401)])],
    "some without": [("no image", []), ("<image><image>", [(7, 7), (381, 399)]), ("", [])],
}


@SPLIT
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
def test_padded_batches_equal_transformers(
    name: str, side: Literal["left", "right"], split: bool
) -> None:
    texts = [text for text, _ in BATCHES[name]]
    images: list[list[Image.Image]] = [[noise(*size) for size in own] for _, own in BATCHES[name]]
    wanted = transformers_processor(split)(
        text=texts, images=images, padding=True, padding_side=side, return_tensors="np"
    )
    got = engine_processor(split).padded(texts, images, side)
    assert got.keys() == wanted.keys()
    for key, array in wanted.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_array_equal(got[key], array)


def test_padded_batch_without_images_has_no_pixels() -> None:
    wanted = transformers_processor(True)(text=["a", "b c"], padding=True, padding_side="right")
    got = engine_processor(True).padded(["a", "b c"], [[], []])
    assert {key: array.tolist() for key, array in got.items()} == dict(wanted)


@pytest.mark.parametrize("wrong", [0, 2])
def test_number_of_images_must_equal_number_of_slots(wrong: int) -> None:
    images = [noise(2, 2)] * wrong
    message = f"wanted {wrong}, got 1"
    with pytest.raises(PromptError, match=message):
        engine_processor(False).prompt("<image>", images)
    with pytest.raises(PromptError, match=message):
        engine_processor(False).padded(["<image>"], [images])
    with pytest.raises(PromptError, match=message):
        engine_processor(False).chat([{"role": "user", "content": [{"type": "image"}]}], images)


def test_template_that_drops_images_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, processor_config={"chat_template": "no slots"})
    processor = Processor.load(folder, MODEL)
    with pytest.raises(PromptError, match="wanted 1, got 0"):
        processor.chat([{"role": "user", "content": [{"type": "image"}]}], [noise(2, 2)])


def test_bos_in_the_template_is_not_repeated(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content[0].text }}"
    folder = checkpoint(tmp_path, processor_config={"chat_template": source})
    processor = Processor.load(folder, MODEL)
    ids = processor.chat([{"role": "user", "content": "hi"}]).token_ids
    assert ids.count(1) == 1
    assert ids[0] == 1
    plain = "{{ messages[0].content[0].text }}"
    folder = checkpoint(tmp_path, processor_config={"chat_template": plain})
    ids = Processor.load(folder, MODEL).chat([{"role": "user", "content": "<s>hi"}]).token_ids
    # A typed one does not replace the first token
    assert ids[0] == 1
    assert ids.count(1) == 1


@SPLIT
def test_token_prompts(split: bool) -> None:
    processor = engine_processor(split)
    images = [noise(2, 2), noise(500, 400)]
    for text in ("<image>a<image>b", "<image><image>", "x <image> <image>"):
        raw = processor.prompt(text, images)
        got = processor.token_prompt(raw.token_ids, images)
        assert got.token_ids == raw.token_ids
        expected = text.replace(">b", "> b").replace(">a", "> a")
        assert got.prompt.removeprefix("<s>").removeprefix(" ") == expected
        assert len(got.tiles) == len(raw.tiles)


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([1, 32001], 0, "wanted 0, got 1"),
        ([32001] * 63, 1, "64 image tokens for each of 1 images, wanted 64, got 63"),
        ([1, 32003], 0, r"token_ids\[1\]: must be an id below 32003, got 32003"),
        ([-1], 0, r"token_ids\[0\]: must be"),
        ([True], 0, r"token_ids\[0\]: must be"),
        ([1, "2"], 0, r"token_ids\[1\]: must be"),
    ],
)
def test_invalid_token_prompts_are_refused(ids: list[Any], images: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        engine_processor(False).token_prompt(ids, [noise(2, 2)] * images)


@pytest.mark.parametrize("ids", ["12", b"12", bytearray(2), {5, 6}, {5: 6}, {5: 6}.keys(), None, 5])
def test_token_ids_must_be_an_ordered_list(ids: Any) -> None:
    with pytest.raises(PromptError, match="token_ids: must be a list of ids, got"):
        engine_processor(False).token_prompt(ids)


def test_wrong_arguments_are_refused() -> None:
    processor = engine_processor(False)
    not_text: Any = 7
    not_a_side: Any = "top"
    with pytest.raises(PromptError, match="text: must be a string, got int"):
        processor.prompt(not_text)
    with pytest.raises(PromptError, match="one list for each of 2 texts, got 1"):
        processor.padded(["a", "b"], [[]])
    with pytest.raises(PromptError, match="one list for each of 0 texts"):
        processor.padded([], [])
    with pytest.raises(PromptError, match="padding_side: must be 'left' or 'right', got 'top'"):
        processor.padded(["a"], [[]], not_a_side)
    with pytest.raises(ImageError, match="cannot be read"):
        processor.prompt("<image>", ["missing.png"])


def test_tokenizer_without_padding_cannot_pad(tmp_path: Path) -> None:
    settings = json.loads((EIGHT_B / "tokenizer_config.json").read_text())
    folder = checkpoint(tmp_path, tokenizer_config=settings | {"pad_token": None})
    with pytest.raises(PromptError, match="needs a pad_token"):
        Processor.load(folder, MODEL).padded(["a"], [[]])


def checkpoint(folder: Path, **changes: dict[str, Any]) -> Path:
    """Copy the checkpoint's processor files, with some of them replaced."""
    for name in ("tokenizer", "tokenizer_config", "processor_config", "preprocessor_config"):
        shutil.copy(EIGHT_B / f"{name}.json", folder)
    for name, values in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("split", "wanted"), [(None, True), (True, True), (False, False)])
def test_splitting_follows_the_caller_or_the_checkpoint(split: bool | None, wanted: bool) -> None:
    assert Processor.load(EIGHT_B, MODEL, split=split).image_config.split is wanted


def test_base_model_cannot_chat(tmp_path: Path) -> None:
    tokenizer = json.loads((EIGHT_B / "tokenizer.json").read_text())
    del tokenizer["added_tokens"][-1]
    folder = checkpoint(tmp_path, tokenizer=tokenizer)
    (folder / "processor_config.json").unlink()
    processor = Processor.load(folder, MODEL)
    assert processor.image_seq_len == 64
    with pytest.raises(PromptError, match="takes plain prompts only"):
        processor.chat([{"role": "user", "content": "hi"}])
    assert processor.prompt("In this image").token_ids == [1, 560, 456, 3469]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processor_config": {"image_seq_len": 63}}, "must be the model's 64 latents, got 63"),
        (
            {"preprocessor_config": {"size": {"longest_edge": 994, "shortest_edge": 378}}},
            "size must give every side 1 to 70 patches of 14 pixels, got 378 to 994",
        ),
        (
            {"preprocessor_config": {"size": {"longest_edge": 980, "shortest_edge": 13}}},
            "got 13 to 980 pixels",
        ),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Processor.load(checkpoint(tmp_path, **changes), MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token_id": 7}, "<image> must have the model's id 7, got 32001"),
        (
            {"text_config": {"vocab_size": 32002}},
            "must have at most the model's 32002 tokens, got 32003",
        ),
    ],
)
def test_tokenizer_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    config = json.loads((EIGHT_B / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        Processor.load(EIGHT_B, ModelConfig.from_dict(config | changes))


@SPLIT
def test_the_tokenizer_reads_one_image_token_an_image(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = engine_processor(split)
    tokenizer = processor.tokenizer
    texts: list[str] = []
    encode = tokenizer.encode

    def watched(text: str) -> list[int]:
        texts.append(text)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", watched)
    images, tiles = 2, 2 * (5 if split else 1)
    ids = processor.draft_prompt("a<image> b<image>c", [noise(4, 4)] * 2).token_ids
    assert [text.count("<image>") for text in texts] == [images]
    assert ids.count(tokenizer.image_id) == 64 * tiles
    # Where the counts do not fit, the whole text is read
    monkeypatch.setattr(tokenizer, "encode", lambda text: [*watched(text), tokenizer.image_id])
    longer = processor.draft_prompt("a<image> b<image>c", [noise(4, 4)] * 2).token_ids
    assert [text.count("<image>") for text in texts[1:]] == [images, 64 * tiles]
    assert longer == [*ids, tokenizer.image_id]
