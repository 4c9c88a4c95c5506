"""Access to standard streams that may be absent, closed, full, or limited in their encoding."""

import codecs
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, BinaryIO, NoReturn, TextIO, cast

from idefics2_engine.errors import Idefics2Error, PromptError

# A prompt or a line with more bytes exceeds any context
_MOST_TEXT = 16 << 20


class StandardOutputError(Exception):
    """Standard output cannot be written.

    Attributes:
        reader_left: Whether the reader of a pipe has exited, like ``head``.
        exit_code: 141 if the reader has exited, as in the shell for a program that a broken pipe
            ended, and 1 otherwise.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {_reason(error)}")
        self.reader_left = error.errno == errno.EPIPE
        self.exit_code = 141 if self.reader_left else 1


def occupy_descriptors() -> None:
    """Open the null device for closed standard streams, so that no file gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard standard output and standard error as long as the context lasts.

    Errors of standard error are ignored.

    Raises:
        StandardOutputError: Standard output cannot be written.
    """

    def raise_lost(error: OSError) -> NoReturn:
        raise StandardOutputError(error)

    def pass_over(error: OSError) -> None:
        """Ignore the error, which cannot be reported."""

    out, err = _Guard(sys.stdout, raise_lost), _Guard(sys.stderr, pass_over)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield


class _Guard:
    """A text stream that writes ``?`` for what it cannot encode, and passes errors to ``lost``."""

    def __init__(self, stream: TextIO | None, lost: Callable[[OSError], None]) -> None:
        self._stream = None if stream is None or stream.closed else stream
        self._lost = lost

    def write(self, text: str) -> int:
        stream = self._stream
        if stream is None:
            self._lost(OSError(errno.EBADF, os.strerror(errno.EBADF)))
            return len(text)
        if stream.encoding is not None and stream.errors == "strict":
            text = text.encode(stream.encoding, "replace").decode(stream.encoding)
        self._try(lambda: stream.write(text))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._let_go()
            self._lost(error)

    def _let_go(self) -> None:
        """Send buffered text to the null device, because flushing it at exit would fail."""
        # Not every stream has a file descriptor
        with suppress(AttributeError, OSError):
            number = cast(TextIO, self._stream).fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def print_json(value: object) -> None:
    """Print ``value`` as a line of JSON, with escapes for characters that the encoding lacks."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    print(line)


def are_terminals() -> bool:
    """Return whether standard input and standard output are both terminals."""
    return _has_input() and sys.stdin.isatty() and sys.stdout.isatty()


def input_bytes(limit: int, error: type[Idefics2Error]) -> bytes:
    """Return all of standard input.

    Raises:
        Idefics2Error: An error of the class ``error``. The input cannot be read or has more than
            ``limit`` bytes.
    """
    return _read(lambda stream: stream.read(limit + 1), limit, error)


def input_text() -> str:
    """Return all of standard input as text, without the end of its last line.

    Raises:
        PromptError: The input cannot be read, is not text, or has more than 16 MiB.
    """
    return _decoded(input_bytes(_MOST_TEXT, PromptError))


def input_lines() -> Iterator[str]:
    """Yield the lines of standard input as they arrive, without their ends.

    Raises:
        PromptError: The input cannot be read, is not text, or has a line of more than 16 MiB.
    """
    while line := _read(lambda stream: stream.readline(_MOST_TEXT + 1), _MOST_TEXT, PromptError):
        yield _decoded(line)


def _read(read: Callable[[BinaryIO], bytes], limit: int, error: type[Idefics2Error]) -> bytes:
    if not _has_input():
        raise error("standard input: must be open, got it closed")
    try:
        data = read(sys.stdin.buffer)
    except OSError as reason:
        raise error(f"standard input: cannot be read: {_reason(reason)}") from None
    if len(data) > limit:
        raise error(f"standard input: must have at most {limit} bytes at once, got more")
    return data


def _has_input() -> bool:
    return sys.stdin is not None and not sys.stdin.closed


def _decoded(data: bytes) -> str:
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else sys.stdin.encoding
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise PromptError(f"standard input: must be text in {encoding.upper()}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
