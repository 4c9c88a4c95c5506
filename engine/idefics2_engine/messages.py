"""Conversations as callers write them, in OpenAI's or transformers' shape, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics2_engine.errors import PromptError
from idefics2_engine.media import ImageSource
from idefics2_engine.prompt import check_text
from idefics2_engine.shown import shown


def read_messages(
    messages: Sequence[Mapping[str, Any]], images: Sequence[ImageSource] = ()
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Check a conversation and take the images out of it.

    Args:
        messages: Each ``{"role": str, "content": str or list of parts}``, a part being one of
            ``{"type": "text", "text": str}``, ``{"type": "image"}``, which takes the next of
            ``images``, ``{"type": "image", "image" or "url" or "path": source}`` and
            ``{"type": "image_url", "image_url": {"url": source}}``.
        images: What the bare image parts stand for, in order.

    Returns:
        The messages, their content always a list of text parts and bare image parts, and the
        source of each image part.

    Raises:
        PromptError: A message has another shape or a key that is not listed here (a ``chat_template``
            among them: templates come with the checkpoint alone), its text cannot be written in
            UTF-8, or there are more or fewer images than bare parts.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"messages: must be a list of at least one message, got {shown(messages)}"
        )
    turns = []
    sources: list[ImageSource | None] = []
    for index, message in enumerate(messages):
        turn, message_sources = _read_message(message, f"messages[{index}]")
        turns.append(turn)
        sources += message_sources
    bare = sum(source is None for source in sources)
    if bare != len(images):
        raise PromptError(
            f"messages: must have as many image parts without a source as there are images, "
            f"wanted {len(images)}, got {bare}"
        )
    rest = iter(images)
    return turns, [next(rest) if source is None else source for source in sources]


def _read_message(message: Any, where: str) -> tuple[dict[str, Any], list[ImageSource | None]]:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        got = type(message).__name__
        if isinstance(message, Mapping):
            got = shown(sorted(map(str, message)))
        raise PromptError(f"{where}: must be a dict with 'role' and 'content', got {got}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role:
        raise PromptError(f"{where}: role must be a string with characters, got {shown(role)}")
    check_text(role, f"{where}: role")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(
            f"{where}: content must be a string or a list of at least one part, got {shown(content)}"
        )
    parts = []
    sources: list[ImageSource | None] = []
    for index, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") == "text":
            parts.append({"type": "text", "text": _read_text(part, f"{where}: content[{index}]")})
        else:
            parts.append({"type": "image"})
            sources.append(_read_source(part, f"{where}: content[{index}]"))
    return {"role": role, "content": parts}, sources


def _read_text(part: Mapping[str, Any], where: str) -> str:
    match part:
        case {"text": str(text)} if len(part) == 2:
            check_text(text, where)
            return text
    raise PromptError(f"{where}: must be {{'type': 'text', 'text': string}}, got {shown(part)}")


def _read_source(part: Any, where: str) -> ImageSource | None:
    """Return where an image part's image is, None if it is the caller's next."""
    match part:
        case {"type": "image"} if len(part) == 1:
            return None
        case (
            {"type": "image", "image": source}
            | {"type": "image", "url": source}
            | {"type": "image", "path": source}
            | {"type": "image_url", "image_url": {"url": source}}
        ) if len(part) == 2 and source is not None:
            found: ImageSource = source
            return found
    raise PromptError(f"{where}: must be a text, image or image_url part, got {shown(part)}")
