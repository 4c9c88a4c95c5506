"""Train the demo checkpoint's tokenizer: byte-pair pieces with byte fallback, ids as in Idefics2.

    PYTHONPATH=engine:kernels python examples/training/build_tokenizer.py examples/demo

Ids 0 to 2 are ``<unk>``, ``<s>`` and ``</s>``, and 3 to 258 are the bytes. Letters and pieces
follow. The last three ids are the control tokens around images and utterances. Every digit and
punctuation mark is a piece of its own, and no piece crosses the beginning of a word.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from questions import example
from words import WORDS

NUM_PIECES = 960
BOUNDARY = "\u2581"
FIRST_TOKENS = ("<unk>", "<s>", "</s>")
LAST_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
NUM_EXAMPLES = 6000

# Words that people type to a program about pictures. The scenes' questions lack some of them.
_COMMON = """
a about above after again all alone also always am among an and another answer any anything are around as ask at away be
because before behind below between big bigger both but by can change changes close come compare contain correct could
dark day describe detail did different do does done down draw drawn each else empty end every everything explain far
few fewer file find first follow for from full get give go good goodbye has have hello help here hi high his how i if in
inside into is it its just kind know large last least left less letter light like line list little long look lot low main
make many may me mean middle might more most move much must my name near need never new next nice no none not nothing
now of off old on one only open or order other our out outside over page part people picture photo place please point
position prompt question quick quit read really right run same say says screen second see seem sentence set shape she
short should show side similar simple since size small some something start still story such take tell text than thank
thanks that the their them then there these they thing things think third this those three time to together too try
two under understand until up upper us use used user very view want was way we well were what when where whether which
while who why will with without word words work would write wrong yes you your
file folder image images model option prompt version error exit open save load json true false null device dtype seed
temperature token tokens output input batch chat generate help quit
"""


def main() -> None:
    """Read the command line; write ``tokenizer.json`` and ``tokenizer_config.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tokenizer = trained_tokenizer()
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", tokenizer_config(tokenizer))


def trained_tokenizer() -> dict[str, object]:
    """Train on the conversations of scenes and return the parsed ``tokenizer.json``."""
    base = [*FIRST_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES - len(LAST_TOKENS),
        special_tokens=base,
        initial_alphabet=[BOUNDARY, *(c for c in string.printable if c.isprintable() and c != " ")],
        # The scenes print these 95 characters and no others
        limit_alphabet=95,
        show_progress=False,
    )
    scratch = Tokenizer(models.BPE())
    scratch.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=BOUNDARY, prepend_scheme="first", split=True),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    scratch.train_from_iterator(_texts(), trainer)
    model = json.loads(scratch.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    assert pieces[: len(base)] == base
    specials = {token: FIRST_TOKENS.index(token) for token in FIRST_TOKENS}
    specials |= {token: len(pieces) + place for place, token in enumerate(LAST_TOKENS)}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, token_id) for token, token_id in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": BOUNDARY,
            "prepend_scheme": "first",
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BOUNDARY}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: place for place, piece in enumerate(pieces)},
            "merges": model["merges"],
        },
    }


def tokenizer_config(tokenizer: dict[str, object]) -> dict[str, object]:
    """Return the ``tokenizer_config.json`` that goes with a parsed ``tokenizer.json``."""
    added = tokenizer["added_tokens"]
    assert isinstance(added, list)
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
        "additional_special_tokens": list(LAST_TOKENS),
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "processor_class": "Idefics2Processor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def _texts() -> Iterator[str]:
    """Yield texts that the tokenizer should encode in few pieces, frequent ones several times."""
    yield from ["User: Assistant:"] * 2000
    for place in range(NUM_EXAMPLES):
        for conversation in example(f"tokenizer {place}", invented=0.0).conversations:
            for question, answer in conversation.turns:
                yield f"User: {question}"
                yield f"Assistant: {answer}"
    rng = random.Random("tokenizer words")
    common = _COMMON.split()
    for _ in range(100):
        yield " ".join(rng.sample(common, len(common)))
    # An answer prints a word after a quotation mark
    for word in WORDS:
        yield from [f'"{word}"'] * 8


def _added(token: str, token_id: int) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": token, **flags, "special": True}


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
