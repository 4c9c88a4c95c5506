"""Text with places for pictures, as tasks write it, as the parts of a message."""

from collections.abc import Sequence
from typing import Any

from idefics2_engine.images.loader import ImageSource
from idefics2_engine.prompts.tokenizer import IMAGE


def message_parts(text: str, images: Sequence[ImageSource] = ()) -> list[dict[str, Any]]:
    """Return the parts of a message: pictures where ``text`` has ``<image>``, or before it if not.

    Args:
        text: Text of a task.
        images: Sources. Without any, each ``<image>`` is a part without a source.
    """
    if IMAGE not in text:
        return [*map(_picture, images), {"type": "text", "text": text}]
    sources = iter(images)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            parts.append(_picture(next(sources, None)))
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts + [_picture(source) for source in sources]


def _picture(source: ImageSource | None) -> dict[str, Any]:
    # A part whose source is None counts as one without a source
    return {"type": "image", "image": source}
