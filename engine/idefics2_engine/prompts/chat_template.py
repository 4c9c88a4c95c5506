"""Chat templates, which convert conversations to prompts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from idefics2_engine.errors import ConfigError, PromptError
from idefics2_engine.json_file import read_json_if_there
from idefics2_engine.model_files import is_there, read_text
from idefics2_engine.prompts.template_sandbox import Sandbox
from idefics2_engine.prompts.text_slots import LONGEST_TEXT, Slot, SlottedText
from idefics2_engine.prompts.tokenizer import Tokenizer

# Templates refer to these as bos_token and so on
_NAMED_TOKENS = ("bos", "eos", "pad", "unk")
# Renderings with slots are kept for so many structures, each of so many roles and parts
_KEPT_STRUCTURES = 256
MOST_PARTS = 64

Structure = tuple[tuple[str, ...], ...]
"""The role and the kinds of parts of each message: all that a template gets besides texts."""

BUILT_IN_TEMPLATE = """\
{%- for message in messages -%}
    {{ message.role.capitalize() }}:
    {%- if message.content[0].type != "image" %}{{ " " }}{% endif -%}
    {%- for part in message.content -%}
        {{ "<image>" if part.type == "image" else part.text }}
    {%- endfor -%}
    {{ "<end_of_utterance>\\n" }}
{%- endfor -%}
{{ "Assistant:" if add_generation_prompt }}"""
"""Idefics2's format, for checkpoints that have ``<end_of_utterance>`` but no template."""


class ChatTemplate:
    """The Jinja template that converts a conversation to a prompt."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        """Compile ``source`` in a sandbox.

        Raises:
            ConfigError: ``source`` is not a valid Jinja template, or is too long.
        """
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template: line {error.lineno}: {error.message}") from None
        # Jinja's parser and Python's compiler can raise many classes of errors
        except Exception as error:
            raise ConfigError(f"chat template: {type(error).__name__}: {error!s:.200}") from None
        self._tokenizer = tokenizer
        names = {f"{name}_token": getattr(tokenizer, name) for name in _NAMED_TOKENS}
        self._tokens = {name: token for name, token in names.items() if token is not None}
        # What a template draws at random differs between conversations of one structure
        self._may_share = "random" not in source
        self.slotted = lru_cache(_KEPT_STRUCTURES)(self.find_slotted)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Find the template of the checkpoint in ``folder``, in transformers' order.

        The order is ``processor_config.json``, ``chat_template.json``, ``chat_template.jinja``,
        ``tokenizer_config.json``, then the built-in template. ``None`` if the tokenizer has no
        ``<end_of_utterance>`` for the built-in one, as for a base model.
        """
        source = _find_template(folder)
        if source is None and tokenizer.end_of_utterance_id is None:
            return None
        return cls(BUILT_IN_TEMPLATE if source is None else source, tokenizer)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the conversation as a prompt for ``Tokenizer.encode_marked``.

        Args:
            messages: The result of ``messages.read_messages``. The template gets roles and texts
                with marks, which matters only to templates that search for ``<`` inside them.
            add_generation_prompt: End with the words after which the assistant answers.

        Raises:
            PromptError: The template rejects the conversation, fails, or exceeds the limits of
                ``template_sandbox`` on time or memory.
        """
        structure = tuple(
            (turn["role"], *(part["type"] for part in turn["content"])) for turn in messages
        )
        given = [part["text"] for turn in messages for part in turn["content"] if "text" in part]
        texts = [self._tokenizer.mark_typed(text) for text in given]
        if (
            self._may_share
            and sum(map(len, structure)) <= MOST_PARTS
            and max(map(len, texts), default=0) <= LONGEST_TEXT
        ):
            slotted = self.slotted(structure, add_generation_prompt)
            if slotted is not None:
                return slotted.fill(texts)
        try:
            with self._sandbox.bounds(sum(map(len, given))):
                return self._template.render(
                    self._variables(structure, texts, add_generation_prompt)
                )
        # A template is a program and may raise any error
        except Exception as error:
            said = self._tokenizer.unmark(str(error))
            raise PromptError(f"chat template: {type(error).__name__}: {said:.500}") from error

    def find_slotted(self, structure: Structure, add_generation_prompt: bool) -> SlottedText | None:
        """Return what the template writes for all texts, ``None`` if it looks at them."""
        slots = map(Slot, itertools.count())
        variables = self._variables(structure, slots, add_generation_prompt)
        try:
            return self._sandbox.render_slots(self._template, variables)
        except Exception:
            # Rendering with the texts themselves raises the error, if it is not about slots
            return None

    def _variables(
        self, structure: Structure, texts: Iterable[object], add_generation_prompt: bool
    ) -> dict[str, Any]:
        """Return what the template is called with: a conversation with ``texts``, in order."""
        rest = iter(texts)
        turns = [
            {
                "role": self._tokenizer.mark_typed(role),
                "content": [
                    {"type": "text", "text": next(rest)} if kind == "text" else {"type": kind}
                    for kind in kinds
                ],
            }
            for role, *kinds in structure
        ]
        return {
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }


def _find_template(folder: Path) -> str | None:
    def in_json(name: str) -> object:
        path = folder / name
        return read_json_if_there(path).get("chat_template")

    found = in_json("processor_config.json") or in_json("chat_template.json")
    jinja_file = folder / "chat_template.jinja"
    if not found and is_there(jinja_file):
        found = read_text(jinja_file)
    found = found or in_json("tokenizer_config.json")
    # A list holds several templates by name
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{folder}: chat_template must be a string, got {type(found).__name__}")
    return found
