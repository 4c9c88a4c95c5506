"""Errors that callers may catch: one subclass of ``ValueError`` for each kind of bad input."""

import reprlib
from numbers import Number
from typing import ClassVar

_MOST_CHARACTERS = 80
# Python raises an error on printing integers that are not much longer
_WRITTEN_BITS = 4096


class Idefics2Error(ValueError):
    """Base class of errors caused by bad input, whose messages name argument, wanted and got.

    With ``--json`` its code is also that of a wrong command line.

    Attributes:
        code: Stable short name of the class for machines, in ``--json`` and in ``to_dict``.
    """

    code: ClassVar[str] = "bad_input"

    def to_dict(self) -> dict[str, str]:
        """Return the error for ``--json`` and ``RequestOutput.to_dict``."""
        return {"code": self.code, "message": str(self)}


class ConfigError(Idefics2Error):
    """A checkpoint's JSON files or chat template, or an argument of ``LLM``, do not fit.

    They are missing, unreadable, or describe an impossible model.
    """

    code = "config"


class CheckpointError(Idefics2Error):
    """Weights are missing, unreadable or do not fit the config."""

    code = "checkpoint"


class ImageError(Idefics2Error):
    """An image cannot be read or used, or the process that decoded it was killed."""

    code = "image"


class MediaNotAllowedError(ImageError):
    """An image's host, address, folder or URL scheme is not allowed."""

    code = "media_not_allowed"


class MediaFetchError(ImageError):
    """An allowed URL did not return an image in time; a retry may succeed."""

    code = "media_fetch"


class ImageWarning(UserWarning):
    """An image was read incompletely."""


class PromptError(Idefics2Error):
    """A prompt or a conversation cannot be converted to token ids.

    It has the wrong shape or does not fit its images, the tokenizer fails on it, or the chat
    template refuses it or exceeds its limits.
    """

    code = "prompt"


class PromptTooLongError(PromptError):
    """A prompt leaves no room for one token of an answer.

    Attributes:
        got: Tokens of the prompt, image tokens included.
        limit: Most tokens of a prompt: one fewer than the context, for the answer.
    """

    code = "prompt_too_long"

    def __init__(self, got: int, context: int) -> None:
        super().__init__(f"prompt must leave room for an answer within {context} tokens, got {got}")
        self.got = got
        self.limit = context - 1

    def __reduce__(self) -> tuple[type["PromptTooLongError"], tuple[int, ...]]:
        """Support pickling, which rebuilds an exception from constructor arguments."""
        return type(self), (self.got, self.limit + 1)


class TooManyImagesError(PromptTooLongError):
    """The image tokens of a prompt alone leave no room for one token of an answer.

    Attributes:
        num_images: Images of the prompt.
    """

    code = "too_many_images"

    def __init__(self, got: int, context: int, num_images: int) -> None:
        super().__init__(got, context)
        self.args = (
            f"images must leave room for an answer within {context} tokens, got {num_images} images "
            f"and {got} tokens",
        )
        self.num_images = num_images

    def __reduce__(self) -> tuple[type["TooManyImagesError"], tuple[int, ...]]:
        """Support pickling, which rebuilds an exception from constructor arguments."""
        return type(self), (self.got, self.limit + 1, self.num_images)


class SamplingError(Idefics2Error):
    """A sampling parameter is unknown, out of range, or does not fit the model."""

    code = "sampling"


class InternalError(Idefics2Error):
    """A row of ``iterate`` or ``submit`` could not be prepared for an internal reason.

    The row is not at fault. The cause is chained.
    """

    code = "internal"


class RequestFailedError(Idefics2Error):
    """The model failed on this request or returned logits that are not finite.

    Other requests continue.
    """

    code = "request_failed"


class StructuredOutputError(RequestFailedError):
    """The answer cannot satisfy its constraint: no token is left, or a limit is exceeded.

    The constraint is ``structured_outputs``. Other parameters may leave no token.
    """

    code = "structured"


class WorkerLostError(Idefics2Error):
    """The worker process of a job ended each time this row ran, the last time with no other row.

    Other rows continue.
    """

    code = "worker_lost"


def install_extras(*extras: str) -> str:
    """Return how to install extras of this package, which is on no index."""
    names = ",".join(extras)
    noun = "extra" if len(extras) == 1 else "extras"
    return f"install the {noun} {names!r} (in the checkout: pip install '.[{names}]')"


def short_repr(value: object) -> str:
    """Return a shortened ``repr`` of plain data, or the type's name for any other object."""
    return _SHORT.repr(value)[:_MOST_CHARACTERS]


class _Short(reprlib.Repr):
    """A ``repr`` that shortens large and deep values and calls no code of unknown classes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits <= _WRITTEN_BITS else f"an integer of {bits} bits"

    def repr_instance(self, value: object, level: int) -> str:
        if isinstance(value, bytes):
            return repr(value[: self.maxother])
        # NumPy's bool is not a Number
        numpy_scalar = getattr(value, "shape", None) == ()
        if value is None or isinstance(value, Number) or numpy_scalar:
            try:
                return repr(value)
            except ValueError:
                # The value contains an integer that is too long to print
                pass
        return f"<{type(value).__name__}>"


_SHORT = _Short()
