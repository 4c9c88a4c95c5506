"""The demo checkpoint's folder: its size, and a tokenizer that encodes any text."""

import json
from functools import cache

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import build_tokenizer
from idefics2_engine.checkpoint.checksums import verify_files
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.prompts.tokenizer import Tokenizer
from paths import EXAMPLES
from words import WORDS

DEMO = EXAMPLES / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_tokenizer_has_few_pieces_with_the_usual_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size <= 1000
    assert tokenizer.encode("<unk><s></s>", add_bos=False) == [0, 1, 2]
    assert tokenizer.encode("<0x41>", add_bos=False) != [3 + 0x41]
    assert len(tokenizer.byte_values) == 256
    assert ModelConfig.load(DEMO).image_token_id == tokenizer.image_id


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
@hypothesis.example(text=" ")
@hypothesis.example(text="  two spaces")
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _loaded_tokenizer()
    # These characters are reserved
    text = text.replace("\ufdd0\ufdd1", "")
    # As in SentencePiece, encoding adds a space before a text that does not begin with one, and
    # decoding removes one
    wanted = text.removeprefix(" ")
    assert tokenizer.decode(tokenizer.encode_plain(text)) == wanted


@cache
def _loaded_tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_tokenizer_spells_answers_in_few_pieces(tokenizer: Tokenizer) -> None:
    answer = "The red circle is at the top left."
    assert len(tokenizer.encode_plain(answer)) == 9
    assert tokenizer.encode_plain("407")[-3:] == [tokenizer.encode_plain(d)[-1] for d in "407"]
    assert max(len(tokenizer.encode_plain(word)) for word in WORDS) <= 6


def test_demo_folder_is_a_small_checkpoint() -> None:
    config = ModelConfig.load(DEMO)
    assert (config.vision.head_dim, config.perceiver.head_dim, config.text.head_dim) == (
        72,
        96,
        128,
    )
    assert config.text.sliding_window is not None
    assert config.text.sliding_window <= 256
    Processor.load(DEMO, config)
    generation = json.loads((DEMO / "generation_config.json").read_text())
    tokens = Tokenizer.load(DEMO)
    assert generation["eos_token_id"] == [tokens.eos_id, tokens.end_of_utterance_id]
    assert generation["bad_words_ids"] == [[tokens.fake_image_id], [tokens.image_id]]
    files = [*DEMO.iterdir(), *(EXAMPLES / "images").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000


@pytest.mark.long
def test_tokenizer_equals_its_scripts_output() -> None:
    tokenizer = build_tokenizer.trained_tokenizer()
    assert tokenizer == json.loads((DEMO / "tokenizer.json").read_text())
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    assert build_tokenizer.tokenizer_config(tokenizer) == settings


def test_demo_folder_passes_its_checksums() -> None:
    verify_files(DEMO, [DEMO / "model.safetensors"])
