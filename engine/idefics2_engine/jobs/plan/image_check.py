"""Checks of the images of rows before a job runs: rows whose images the run would refuse."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, cast

from idefics2_engine.caller_errors import about
from idefics2_engine.errors import ConfigError, Idefics2Error, ImageError
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

    @classmethod
    def named(cls, name: str) -> "ImageCheck":
        """Return the check called ``name``.

        Raises:
            ConfigError: There is no such check.
        """
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(repr(check.value) for check in cls)
            raise ConfigError(f"check_images must be one of {names}, got {name!r}") from None


def check_images(
    rows: Iterable[JobRow], check: ImageCheck | str, media: MediaConfig
) -> Iterator[JobRow]:
    """Return ``rows``, lazily, in which rows with images that the run would refuse have that error.

    Nothing is downloaded. A row that has an error already stays as it is.

    Args:
        rows: Rows of a job.
        check: What to look at.
        media: Rules for images, those of the run.

    Raises:
        ConfigError: There is no such check.
    """
    check = ImageCheck.named(check)
    return (_checked(row, image_error(row, check, media)) for row in rows)


def image_error(row: JobRow, check: ImageCheck, media: MediaConfig) -> RowError | None:
    """Return the error that the first bad image of a row gives, as far as ``check`` looks."""
    if check is ImageCheck.NONE or row.error is not None:
        return None
    look = read_header if check is ImageCheck.HEADER else check_source
    images = images_of(row)
    for index, image in enumerate(images):
        try:
            with about(f"images[{index}]" if len(images) > 1 else None):
                look(image, media)
        except ImageError as error:
            return row_error_of(error, media.allowed_media_root)
    return None


def _checked(row: JobRow, error: RowError | None) -> JobRow:
    return row if error is None else replace(row, prompt=None, error=error)


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
