"""Added tokens of every kind, in raw prompts and in conversations.

They have transformers' ids, and typed text never becomes a control token.
"""

import json
import random
from functools import cache
from itertools import product
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from idefics2_engine.prompts.chat_template import ChatTemplate
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.prompts.tokenizer import Tokenizer
from tokenizer_kinds import DESCRIPTIONS, SETTINGS

FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
KINDS = {
    f"<t{number}>": dict(zip(FLAGS, values, strict=True))
    for number, values in enumerate(product([False, True], repeat=len(FLAGS)))
}
SPECIAL = [token for token, flags in KINDS.items() if flags["special"]]
PLAIN = [token for token, flags in KINDS.items() if not flags["special"]]
AROUND = ["", " ", "  ", "\n", "a", "ab c", "<", "<<", ">", "<t", "t1>", "é", "_", "."]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ token }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ token }}{% endfor %}"
)
# A normalizer that changes text. A normalized token is matched after it.
LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


@cache
def description(kind: str) -> dict[str, Any]:
    """Return a tokenizer with an added token of every kind."""
    plain = DESCRIPTIONS["8b" if kind == "lower" else kind]()
    first = 1 + max(max(plain["model"]["vocab"].values()), plain["added_tokens"][-1]["id"])
    added = [
        {"id": first + number, "content": token, **flags}
        for number, (token, flags) in enumerate(KINDS.items())
    ]
    changed = {**plain, "added_tokens": [*plain["added_tokens"], *added]}
    return changed | ({"normalizer": LOWER} if kind == "lower" else {})


@cache
def load_tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(description(kind), SETTINGS)


@cache
def load_transformers_tokenizer(kind: str) -> Any:
    built = tokenizers.Tokenizer.from_str(json.dumps(description(kind)))
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=built)


@cache
def template(kind: str, source: str) -> ChatTemplate:
    return ChatTemplate(source, load_tokenizer(kind))


def compared(kind: str) -> list[str]:
    """Return the tokens whose ids are transformers'.

    Normalized control tokens are matched before the normalizer here, because marks in typed text
    are set there. This makes a difference if the normalizer changes the token itself. transformers
    then finds it only at the beginning of a text.
    """
    flags = KINDS.items()
    return [
        token
        for token, its in flags
        if kind != "legacy" or not (its["special"] and its["normalized"])
    ]


def texts(tokens: list[str], count: int) -> list[str]:
    """Return texts with ``tokens`` beside spaces, words, and parts of tokens."""
    rng = random.Random(0)
    return [
        "".join(rng.choice(tokens if rng.random() < 0.5 else AROUND) for _ in range(rng.randint(1, 6)))
        for _ in range(count)
    ]  # fmt: skip


ALL = pytest.mark.parametrize("kind", ["8b", "lower", "legacy", "byte level"])


@ALL
def test_ids_of_raw_prompts_equal_transformers(kind: str) -> None:
    for text in texts(compared(kind), 1000):
        wanted = load_transformers_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
        assert load_tokenizer(kind).encode(text, add_bos=False) == wanted, text


@ALL
def test_ids_of_conversations_equal_transformers(kind: str) -> None:
    rng = random.Random(1)
    typed = texts(PLAIN, 400)
    for text in typed:
        parts = [text, rng.choice(typed)][: rng.randint(1, 2)]
        content = [{"type": "text", "text": part} for part in parts]
        messages = [{"role": "user", "content": content}]
        source = TEMPLATE.replace("token", repr(rng.choice([*compared(kind), "<image>", " "])))
        wanted = load_transformers_tokenizer(kind).apply_chat_template(
            messages, chat_template=source, tokenize=True, return_dict=False
        )
        turns, _ = read_messages(messages)
        rendered = template(kind, source).render(turns, add_generation_prompt=False)
        assert load_tokenizer(kind).encode_marked(rendered, add_bos=False) == wanted, (
            source,
            parts,
        )


@ALL
def test_typed_control_tokens_stay_text(kind: str) -> None:
    for text in texts(SPECIAL, 300):
        assert not {*load_tokenizer(kind).encode_plain(text)} & load_tokenizer(kind).control_ids
