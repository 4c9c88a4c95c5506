"""Chat templates, which convert conversations to prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from idefics2_engine.errors import ConfigError, PromptError
from idefics2_engine.json_file import read_json_if_there
from idefics2_engine.model_files import is_there, read_text
from idefics2_engine.prompts.template_sandbox import Sandbox
from idefics2_engine.prompts.tokenizer import Tokenizer

# Templates refer to these as bos_token and so on
_NAMED_TOKENS = ("bos", "eos", "pad", "unk")

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
        marked = [
            {
                "role": self._tokenizer.mark_typed(message["role"]),
                "content": [self._mark_part(part) for part in message["content"]],
            }
            for message in messages
        ]
        names = {f"{name}_token": getattr(self._tokenizer, name) for name in _NAMED_TOKENS}
        size = sum(len(part.get("text", "")) for turn in messages for part in turn["content"])
        try:
            with self._sandbox.bounds(size):
                return self._template.render(
                    messages=marked,
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **{name: token for name, token in names.items() if token is not None},
                )
        # A template is a program and may raise any error
        except Exception as error:
            said = self._tokenizer.unmark(str(error))
            raise PromptError(f"chat template: {type(error).__name__}: {said:.500}") from error

    def _mark_part(self, part: Mapping[str, str]) -> dict[str, str]:
        if part["type"] == "text":
            return {"type": "text", "text": self._tokenizer.mark_typed(part["text"])}
        return {"type": "image"}


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
