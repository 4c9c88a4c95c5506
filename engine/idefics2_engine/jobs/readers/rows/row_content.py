"""What a row asks, whatever its form: a conversation, and what of it belongs to the row's key."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from idefics2_engine.errors import PromptError
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.rows.row_images import RowImage, RowImages
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.prompts.tokenizer import check_text
from idefics2_engine.row import Conversation


class RowContent(NamedTuple):
    """A prompt and the parameters that its row gives.

    Attributes:
        messages: The conversation.
        identity: JSON data that changes when the conversation or one of its images does.
        sampling: Parameters as they are given. None if there are none.
    """

    messages: Conversation
    identity: Any
    sampling: Any


class RowForm(Protocol):
    """Reads rows of one form.

    Attributes:
        id_column: Column of identifiers.
        needs_id: Whether each row must have that column.
    """

    id_column: str
    needs_id: bool

    def read(self, columns: Mapping[str, Any]) -> RowContent:
        """Return the content of a row.

        Raises:
            BadRowError: The row has another shape.
        """


def question(text: Any, images: list[RowImage], sampling: Any) -> RowContent:
    """Return a conversation of one message: the images, then the text, which is only text.

    Raises:
        BadRowError: ``text`` is no string that UTF-8 can encode.
    """
    try:
        check_text(text, "prompt")
    except PromptError as error:
        raise BadRowError(error.code, str(error)) from None
    parts = [{"type": "image", "image": one.source} for one in images]
    content = [*parts, {"type": "text", "text": text}]
    return RowContent(
        [{"role": "user", "content": content}],
        {"prompt": text, "images": [one.identity for one in images]},
        sampling,
    )


def conversation(messages: Any, bare_images: Any, reader: RowImages, sampling: Any) -> RowContent:
    """Return a conversation in the format of OpenAI or transformers.

    Args:
        messages: The messages.
        bare_images: Images of the image parts without a source: one, a list of them, or ``None``.
        reader: Reads images.
        sampling: Parameters of the row.

    Raises:
        BadRowError: A message or an image has another shape.
    """
    bare = bare_images if isinstance(bare_images, list | tuple) else [bare_images]
    try:
        turns, sources = read_messages(messages, [one for one in bare if one is not None])
    except PromptError as error:
        raise BadRowError(error.code, str(error)) from None
    images = iter(reader.read_all(sources, "images"))
    filled, identity = [], []
    for turn in turns:
        content, parts = [], []
        for part in turn["content"]:
            if part["type"] == "image":
                image = next(images)
                content.append({"type": "image", "image": image.source})
                parts.append({"type": "image", "image": image.identity})
            else:
                content.append(part)
                parts.append(part)
        filled.append({"role": turn["role"], "content": content})
        identity.append({"role": turn["role"], "content": parts})
    return RowContent(filled, identity, sampling)
