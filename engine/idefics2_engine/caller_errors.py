"""Context for errors about a caller's input: its name, and exceptions of the caller's own code."""

from contextlib import AbstractContextManager
from types import TracebackType

from idefics2_engine.errors import Idefics2Error, ImageWarning


def about(name: str | None) -> AbstractContextManager[None]:
    """Prefix the message of an error raised inside with ``name``, unless it is ``None``."""
    return _About(name)


def caller_code(name: str, wrong: type[Idefics2Error]) -> AbstractContextManager[None]:
    """Convert exceptions of the caller's objects to an error about ``name``.

    Only code that runs the caller's methods belongs inside. The engine's own bugs there would be
    reported as errors of the caller.

    Raises:
        Idefics2Error: An error of the class ``wrong``. It names the class of the exception, without
            its text.
    """
    return _CallerCode(name, wrong)


# Classes take a fifth of the time of generators, and a prompt has several of these contexts
class _About:
    def __init__(self, name: str | None) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        raised: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._name is not None and isinstance(raised, Idefics2Error):
            raised.args = (f"{self._name}: {raised}",)


class _CallerCode:
    def __init__(self, name: str, wrong: type[Idefics2Error]) -> None:
        self._name = name
        self._wrong = wrong

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        raised: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if isinstance(raised, Exception) and not isinstance(raised, Idefics2Error | ImageWarning):
            kind = type(raised).__name__
            raise self._wrong(f"{self._name}: reading it raised {kind}") from raised
