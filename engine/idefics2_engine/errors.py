"""What a caller may catch: one class per kind of bad input, all of them ``ValueError``."""

import reprlib
from numbers import Number
from typing import ClassVar

_MOST_CHARACTERS = 80
# Python refuses to write integers that are not much longer
_WRITTEN_BITS = 4096


class Idefics2Error(ValueError):
    """Base of every error that bad input causes; the message names what, wanted and got.

    Attributes:
        code: Short name of the class for machines, in ``--json`` and in the error rows of jobs; it
            never changes.
    """

    code: ClassVar[str] = "bad_input"

    def to_dict(self) -> dict[str, str]:
        """Return what machines read of an error, in ``--json`` and in ``RequestOutput.to_dict``."""
        return {"code": self.code, "message": str(self)}


class ConfigError(Idefics2Error):
    """A checkpoint's JSON files are missing, unreadable or describe an impossible model."""

    code = "config"


class CheckpointError(Idefics2Error):
    """Weights are missing, unreadable or do not fit the config."""

    code = "checkpoint"


class ImageError(Idefics2Error):
    """An image cannot be read or used."""

    code = "image"


class MediaNotAllowedError(ImageError):
    """An image lies where this process may not read: a host, an address, a folder or a scheme."""

    code = "media_not_allowed"


class MediaFetchError(ImageError):
    """An allowed address did not give an image in time; another try may."""

    code = "media_fetch"


class ImageWarning(UserWarning):
    """An image was read, but not all of it."""


class PromptError(Idefics2Error):
    """A prompt or a conversation cannot be turned into token ids."""

    code = "prompt"


class PromptTooLongError(PromptError):
    """A prompt does not leave room for one token of an answer; a caller may cut or split it.

    Attributes:
        got: Tokens of the prompt, image tokens included.
        limit: Tokens that a prompt may have: one fewer than the context, which the answer needs.
    """

    code = "prompt_too_long"

    def __init__(self, got: int, context: int) -> None:
        super().__init__(f"prompt must leave room for an answer within {context} tokens, got {got}")
        self.got = got
        self.limit = context - 1

    def __reduce__(self) -> tuple[type["PromptTooLongError"], tuple[int, int]]:
        """Let it pass between processes, which build an error anew from its arguments."""
        return type(self), (self.got, self.limit + 1)


class SamplingError(Idefics2Error):
    """A sampling parameter is out of its range."""

    code = "sampling"


class InternalError(Idefics2Error):
    """A prompt could not be prepared for a reason that is no fault of the prompt.

    The cause is chained.
    """

    code = "internal"


class RequestFailedError(Idefics2Error):
    """The model could not be run on one request, alone in a step, or gave no finite logits.

    The others went on.
    """

    code = "request_failed"


def short_repr(value: object) -> str:
    """Return ``value`` as Python writes it, cut.

    An object that is no plain data is its type's name.
    """
    return _SHORT.repr(value)[:_MOST_CHARACTERS]


class _Short(reprlib.Repr):
    """Writes the beginning of containers.

    Nothing large, deep or of a stranger's class is written out.
    """

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
        numpy_scalar = getattr(value, "shape", None) == ()  # its bool is no Number
        if value is None or isinstance(value, Number) or numpy_scalar:
            try:
                return repr(value)
            except ValueError:  # an integer that is too long to be written is part of it
                pass
        return f"<{type(value).__name__}>"


_SHORT = _Short()
