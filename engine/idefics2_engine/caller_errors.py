"""Errors about what a caller passed: which of several things, and what its own code raised."""

from collections.abc import Iterator
from contextlib import contextmanager

from idefics2_engine.errors import Idefics2Error, ImageWarning


@contextmanager
def about(name: str | None) -> Iterator[None]:
    """Put ``name`` in front of the message of an error raised inside, unless it is ``None``."""
    try:
        yield
    except Idefics2Error as error:
        if name is not None:
            error.args = (f"{name}: {error}",)
        raise


@contextmanager
def caller_code(name: str, wrong: type[Idefics2Error]) -> Iterator[None]:
    """Turn what the caller's own objects raise while they are read into an error about ``name``.

    Only code that runs a caller's methods belongs inside: an error of ours there would be blamed on
    the caller.

    Raises:
        Idefics2Error: Of the class ``wrong``, with the class of what was raised and nothing of its
            text.
    """
    try:
        yield
    except (Idefics2Error, ImageWarning):
        raise
    except Exception as raised:
        raise wrong(f"{name}: reading it raised {type(raised).__name__}") from raised
