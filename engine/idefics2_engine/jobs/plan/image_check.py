"""Checks of the images of rows before a job runs: rows whose images the run would refuse."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, cast

from idefics2_engine.caller_errors import about
from idefics2_engine.errors import Idefics2Error, ImageError
from idefics2_engine.images.header import read_header
from idefics2_engine.images.loader import ImageSource, MediaConfig, check_source
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.prompts.messages import read_messages


class ImageCheck(StrEnum):
    """What is looked at of an image before a job runs."""

    NONE = "none"
    EXISTS = "exists"
    """Files are regular, readable, below the allowed folder and not too large."""
    HEADER = "header"
    """Headers are read: the format, the size and the number of pixels."""


def image_error(
    row: JobRow,
    check: ImageCheck,
    media: MediaConfig,
    check_file: Callable[[ImageSource], None] | None = None,
) -> RowError | None:
    """Return the error that the first bad image of a row gives, as far as ``check`` looks.

    It is the error of the run. Nothing is downloaded, and a row that has an error already gets none.

    Args:
        row: A row of a job.
        check: What to look at.
        media: Rules for images, those of the run.
        check_file: Checks whether an image exists. If ``None``, ``check_source``. A ``SourceCheck``
            is faster for many rows.
    """
    if check is ImageCheck.NONE or row.error is not None:
        return None
    images = images_of(row)
    for index, image in enumerate(images):
        try:
            with about(f"images[{index}]" if len(images) > 1 else None):
                if check is ImageCheck.HEADER:
                    read_header(image, media)
                elif check_file is None:
                    check_source(image, media)
                else:
                    check_file(image)
        except ImageError as error:
            return row_error_of(error, media.allowed_media_root)
    return None


def images_of(row: JobRow) -> list[ImageSource]:
    """Return the images of a row, in order; none if its prompt is malformed."""
    prompt = row.prompt
    if isinstance(prompt, Mapping):
        media = prompt.get("multi_modal_data")
        images: Any = media.get("image", []) if isinstance(media, Mapping) else []
        return list(images) if isinstance(images, list | tuple) else [images]
    if prompt is None or isinstance(prompt, str):
        return []
    try:
        return read_messages(cast(Any, prompt))[1]
    except Idefics2Error:
        # The engine gives such a row its error
        return []
