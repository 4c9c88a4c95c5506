"""Renderings with slots: what they write is what a rendering with the texts writes."""

import itertools
import json
from functools import cache
from typing import Any

import pytest

from idefics2_engine.errors import PromptError
from idefics2_engine.prompts import chat_template
from idefics2_engine.prompts.chat_template import BUILT_IN_TEMPLATE, ChatTemplate
from idefics2_engine.prompts.template_sandbox import Sandbox
from idefics2_engine.prompts.text_slots import LONGEST_TEXT
from idefics2_engine.prompts.tokenizer import Tokenizer
from paths import EIGHT_B

PUBLISHED = json.loads((EIGHT_B / "processor_config.json").read_text())["chat_template"]
PARTS = "{% for m in messages %}{% for part in m.content %}"
ENDS = "{% endfor %}{% endfor %}"
TEXTS = ("hello", "", " a b ", "<image>", "x" * LONGEST_TEXT, "{{ 1 }}", "5", "None", "\ufdd0")


def every_part(code: str) -> str:
    return f"{PARTS}{{% if part.type == 'text' %}}{code}{{% else %}}I{{% endif %}}{ENDS}"


SHARED = [
    BUILT_IN_TEMPLATE,
    PUBLISHED,
    every_part("{{ part.text }}"),
    every_part("{{ part['text'] }}{{ part.text }}{{ loop.index }}"),
    every_part("{% set x = part.text %}-{{ x }}"),
    every_part("{% set ns = namespace(x=part) %}{{ ns.x.text }}"),
    "{% for m in messages %}{{ (m.content | selectattr('type', 'eq', 'text') | first).text }}"
    "{% endfor %}",
]
LOOKED_AT = [
    every_part(code)
    for code in (
        "{{ part.text | trim }}",
        "{{ part.text | length }}",
        "{{ part.text | default('x') }}",
        "{{ part.text.strip() }}",
        "{{ part.text.upper() }}",
        "{{ part.text[0] }}",
        "{{ part.text['upper']() }}",
        "{{ part.text[1:] }}",
        "{{ part.text ~ '!' }}",
        "{{ part.text + '!' }}",
        "{{ '!' + part.text }}",
        "{{ part.text * 2 }}",
        "{{ '%s' % part.text }}",
        "{{ '%(text)s' % part }}",
        "{{ '{}'.format(part.text) }}",
        "{{ '{0[text]}'.format(part) }}",
        "{{ 'yes' if part.text else 'no' }}",
        "{{ not part.text }}",
        "{{ part.text == 'hello' }}",
        "{{ 'hello' != part.text }}",
        "{{ part.text < 'i' }}",
        "{{ 'e' in part.text }}",
        "{{ part.text in ['hello'] }}",
        "{{ part.text in {'hello': 1} }}",
        "{{ {part.text: 1} }}",
        "{{ {'hello': 1}[part.text] }}",
        "{{ [1, 2][part.text] }}",
        "{{ [1, 2].count(part.text) }}",
        "{{ part.text is string }}",
        "{{ part.text is defined }}",
        "{{ part.text is eq('hello') }}",
        "{% for letter in part.text %}{{ letter }}.{% endfor %}",
        "{{ part }}",
        "{{ [part.text] }}",
        "{{ part | tojson }}",
        "{{ [part.text] | join('-') }}",
        "{{ [part] | map(attribute='text') | join }}",
        "{{ [part] | map(attribute='text') | map('upper') | list }}",
        "{{ [part] | selectattr('text', 'string') | list | length }}",
        "{{ (messages[0].content[1:] | sort(attribute='text') | first).text }}",
        "{{ messages[0].content[1:] | groupby('text') | length }}",
        "{{ [part] | unique(attribute='text') | list | length }}",
        "{% set x %}{{ part.text }}{% endset %}{{ x | upper }}",
        "{% filter upper %}{{ part.text }}{% endfilter %}",
        "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(part.text) | upper }}",
        "{% autoescape true %}{{ part.text }}{% endautoescape %}",
        "{{ raise_exception(part.text) }}",
        "{{ range(part.text | int) | list }}",
        "{{ loop.changed(part.text) }}{{ loop.changed('hello') }}",
        "{{ dict(a=part.text) }}",
        "{{ messages | string | length }}",
    )
]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EIGHT_B)


def conversation(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text} for text in texts]
    return [
        {"role": "user", "content": [{"type": "image"}, *parts]},
        {"role": "assistant", "content": parts[:1]},
    ]


def rendered(template: ChatTemplate, texts: tuple[str, ...]) -> str:
    try:
        return template.render(conversation(texts), True)
    except PromptError as error:
        return f"PromptError: {error}"


@pytest.mark.parametrize("source", SHARED + LOOKED_AT)
def test_texts_in_slots_are_written_as_by_the_template(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slotted = ChatTemplate(source, tokenizer())
    pairs = list(itertools.product(TEXTS, TEXTS[:3]))
    found = [rendered(slotted, pair) for pair in pairs]
    monkeypatch.setattr(chat_template, "MOST_PARTS", -1)
    assert found == [rendered(slotted, pair) for pair in pairs]


@pytest.mark.parametrize("source", SHARED)
def test_a_structure_is_rendered_once(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(source, tokenizer())
    rendered(template, ("first", "words"))

    def never(*_: object) -> None:
        raise RuntimeError("rendered")

    monkeypatch.setattr(Sandbox, "bounds", never)
    assert "second" in rendered(template, ("second", "words"))
    with pytest.raises(PromptError, match="rendered"):
        template.render(conversation(("third", "has", "another structure")), True)


@pytest.mark.parametrize("source", LOOKED_AT)
def test_a_text_that_the_template_looks_at_has_no_slot(source: str) -> None:
    template = ChatTemplate(source, tokenizer())
    structure = (("user", "image", "text", "text"), ("assistant", "text"))
    assert template.find_slotted(structure, True) is None


def test_a_template_that_draws_at_random_is_rendered_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = ChatTemplate("{{ [1, 2] | random }}{{ messages[0].content[0].text }}", tokenizer())
    monkeypatch.setattr(template, "slotted", None)
    found = {template.render(conversation(("a",))[1:], True) for _ in range(100)}
    assert found == {"1a", "2a"}


def test_a_slot_counts_as_the_longest_text_that_it_may_hold() -> None:
    """A rendering with slots is refused where one with texts could be."""
    many = every_part("{% for i in range(COUNT) %}{{ part.text }}{% endfor %}")
    few, most = (
        ChatTemplate(many.replace("COUNT", str(count)), tokenizer()).find_slotted(
            (("user", "text"),), True
        )
        for count in (10, 2**20 // LONGEST_TEXT + 1)
    )
    assert few is not None
    assert most is None
