"""Context for errors about a caller's input: its name, and exceptions of the caller's own code."""

from collections.abc import Iterator
from contextlib import contextmanager

from idefics2_engine.errors import Idefics2Error, ImageWarning


@contextmanager
def about(name: str | None) -> Iterator[None]:
    """Prefix the message of an error raised inside with ``name``, unless it is ``None``."""
    try:
        yield
    except Idefics2Error as error:
        if name is not None:
            error.args = (f"{name}: {error}",)
        raise


@contextmanager
def caller_code(name: str, wrong: type[Idefics2Error]) -> Iterator[None]:
    """Convert exceptions of the caller's objects to an error about ``name``.

    Only code that runs the caller's methods belongs inside. The engine's own bugs there would be
    reported as errors of the caller.

    Raises:
        Idefics2Error: An error of the class ``wrong``. It names the class of the exception, without
            its text.
    """
    try:
        yield
    except (Idefics2Error, ImageWarning):
        raise
    except Exception as raised:
        raise wrong(f"{name}: reading it raised {type(raised).__name__}") from raised
