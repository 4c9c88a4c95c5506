"""What a reader of a report sees of a row: its question, its pictures and its answers."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

from PIL import Image

from idefics2_engine.errors import Idefics2Error, PromptError
from idefics2_engine.images.loader import ImageSource, MediaConfig, load_image
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.report_page import Picture, TableRow, Text

# Twice what the page shows, for screens with small pixels
_THUMBNAIL_PIXELS = 320
_JPEG_QUALITY = 80
_MOST_CHARACTERS = 4000
_MOST_PICTURES = 12
_URLS = ("http://", "https://")


class RowViews:
    """Makes rows of a report's table: row, pictures, question and answers.

    Pictures are read through the engine's door for images, once each. URLs are not fetched again.

    Args:
        media: Rules for reading images.
    """

    def __init__(self, media: MediaConfig) -> None:
        self._media = media
        self._pictures: dict[str | bytes, Picture | Text] = {}

    def view(self, row: JobRow, out: Mapping[str, Any]) -> TableRow:
        """Return the table's row of a job's row and its row of the output."""
        turns, sources = _question(row)
        pictures = [self._picture(source) for source in sources[:_MOST_PICTURES]]
        if len(sources) > _MOST_PICTURES:
            pictures.append(Text(f"and {len(sources) - _MOST_PICTURES} more", "muted"))
        label = [Text(str(out["id"]), "strong"), Text(f"row {out['row']}", "muted")]
        return TableRow([label, pictures, turns, _answers(out)], is_bad=out["error"] is not None)

    def _picture(self, source: ImageSource) -> Picture | Text:
        if not isinstance(source, str | bytes):
            return self._thumbnail(source)
        if source not in self._pictures:
            self._pictures[source] = self._thumbnail(source)
        return self._pictures[source]

    def _thumbnail(self, source: ImageSource) -> Picture | Text:
        if isinstance(source, str) and source.lower().startswith(_URLS):
            return Text("picture at a URL", "muted")
        try:
            image = load_image(source, self._media)
        except Idefics2Error:
            return Text("picture cannot be read", "error")
        if image is source:
            image = image.copy()
        image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
        data = base64.b64encode(file.getvalue()).decode()
        return Picture(f"data:image/jpeg;base64,{data}", *image.size, alt="picture of the row")


def _question(row: JobRow) -> tuple[list[Text], list[ImageSource]]:
    """Return the texts and the images of a row; a conversation's texts follow their roles."""
    prompt: Any = row.prompt
    if prompt is None:
        return [Text(row.place, "muted")], []
    if isinstance(prompt, str):
        return [_text(prompt)], []
    if isinstance(prompt, Mapping):
        images = (prompt.get("multi_modal_data") or {}).get("image", [])
        several = list(images) if isinstance(images, list | tuple) else [images]
        return [_text(str(prompt.get("prompt", "token ids")))], several
    try:
        turns, sources = read_messages(cast(Sequence[Mapping[str, Any]], prompt), [], "messages")
    except PromptError:
        return [Text("cannot be read", "error")], []
    parts = []
    for turn in turns:
        if len(turns) > 1:
            parts.append(Text(turn["role"], "muted"))
        text = "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")
        if text:
            parts.append(_text(text))
    return parts, sources


def _answers(out: Mapping[str, Any]) -> list[Text]:
    parts = []
    if (error := out["error"]) is not None:
        parts = [Text(error["code"], "badge error"), Text(error["message"], "error")]
    for index, answer in enumerate(out["outputs"]):
        if len(out["outputs"]) > 1:
            parts.append(Text(f"answer {index + 1}", "muted"))
        parts.append(_text(answer["text"]) if answer["text"] else Text("no text", "muted"))
        if answer["finish_reason"] == "length":
            parts.append(Text("cut off at the limit of tokens", "badge muted"))
    return parts


def _text(text: str) -> Text:
    rest = len(text) - _MOST_CHARACTERS
    return Text(text if rest <= 0 else f"{text[:_MOST_CHARACTERS]}… ({rest:,} more characters)")
