"""Validation of conversations in the format of OpenAI or transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics2_engine.caller_errors import caller_code
from idefics2_engine.errors import PromptError, short_repr
from idefics2_engine.images.loader import ImageSource
from idefics2_engine.prompts.tokenizer import check_text

ROLES = ("system", "user", "assistant")


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[ImageSource] = (),
    name: str = "messages",
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Check a conversation and extract its images.

    A message is ``{"role": "system", "user" or "assistant", "content": str or list of parts}``.
    A part is one of

    - ``{"type": "text", "text": str}``
    - ``{"type": "image"}``, a bare part, which stands for the next of ``images``
    - ``{"type": "image", "image" or "url" or "path": source}``
    - ``{"type": "image_url", "image_url": url or {"url": source}}``, where ``detail`` is ignored

    A key whose value is ``None`` counts as missing, because ``datasets`` gives all rows all keys.

    Args:
        messages: The conversation.
        images: Images of the bare parts, in order.
        name: Name of the conversation in errors.

    Returns:
        The messages, whose content is a list of text parts and bare image parts, and the source of
        each image part. Only the sources are objects of the caller.

    Raises:
        PromptError: A message has another format or an unknown key, such as ``chat_template``. Or
            its text cannot be encoded in UTF-8, the numbers of images and bare parts differ, or
            reading it raised an error.
    """
    turns = []
    sources: list[ImageSource | None] = []
    with caller_code(name, PromptError):
        if (
            isinstance(messages, str | Mapping)
            or not isinstance(messages, Sequence)
            or not messages
        ):
            raise PromptError(
                f"{name}: must be a list of at least one message, got {short_repr(messages)}"
            )
        for index, message in enumerate(messages):
            where = f"{name}[{index}]"
            with caller_code(where, PromptError):
                turn, message_sources = _read_message(message, where)
            turns.append(turn)
            sources += message_sources
    bare = sum(source is None for source in sources)
    if bare != len(images):
        raise PromptError(
            f"{name}: must have as many image parts without a source as there are images, "
            f"wanted {len(images)}, got {bare}"
        )
    rest = iter(images)
    return turns, [next(rest) if source is None else source for source in sources]


def _read_message(message: Any, where: str) -> tuple[dict[str, Any], list[ImageSource | None]]:
    given = _given(message)
    if not isinstance(given, dict) or given.keys() != {"role", "content"}:
        got = (
            short_repr(sorted(map(str, given)))
            if isinstance(given, dict)
            else type(message).__name__
        )
        raise PromptError(f"{where}: must be a dict with 'role' and 'content', got {got}")
    role, content = given["role"], given["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(
            f"{where}: role must be 'system', 'user' or 'assistant', got {short_repr(role)}"
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(
            f"{where}: content must be a string or a list of at least one part, got {short_repr(content)}"
        )
    parts = []
    sources: list[ImageSource | None] = []
    for index, part in enumerate(map(_given, content)):
        if isinstance(part, dict) and part.get("type") == "text":
            parts.append({"type": "text", "text": _read_text(part, f"{where}: content[{index}]")})
        else:
            parts.append({"type": "image"})
            sources.append(_read_source(part, f"{where}: content[{index}]"))
    return {"role": role, "content": parts}, sources


def _given(value: Any) -> Any:
    """Return a mapping as a dict without ``None`` values, and other values unchanged."""
    if type(value) is dict:
        # An array may be a value, so the values are not compared
        for one in value.values():
            if one is None:
                break
        else:
            # The usual case, which needs no copy
            return value
    if not isinstance(value, Mapping):
        return value
    return {key: one for key, one in value.items() if one is not None}


def _read_text(part: Mapping[str, Any], where: str) -> str:
    match part:
        case {"text": str(text)} if len(part) == 2:
            check_text(text, where)
            return text
    raise PromptError(
        f"{where}: must be {{'type': 'text', 'text': string}}, got {short_repr(part)}"
    )


def _read_source(part: Any, where: str) -> ImageSource | None:
    """Return the source of an image part; ``None`` for a bare part."""
    found: ImageSource
    match part:
        case {"type": "image"} if len(part) == 1:
            return None
        case {"type": "image_url", "image_url": str(url)} if len(part) == 2:
            return url
        case {"type": "image_url", "image_url": {"url": source} as url} if (
            len(part) == 2 and source is not None and url.keys() <= {"url", "detail"}
        ):
            found = source
            return found
        case (
            {"type": "image", "image": source}
            | {"type": "image", "url": source}
            | {"type": "image", "path": source}
        ) if len(part) == 2:
            found = source
            return found
    raise PromptError(f"{where}: must be a text, image or image_url part, got {short_repr(part)}")
