"""How an error shows the value that it got: short, whatever the value, and without addresses in memory."""

import reprlib
from numbers import Number

_LENGTH = 80  # characters
_WRITTEN_BITS = 4096  # Python refuses to write integers that are not much longer


def shown(value: object) -> str:
    """Return ``value`` as Python writes it, cut; an object that is no plain data by its type's name."""
    return _SHORT.repr(value)[:_LENGTH]


class _Short(reprlib.Repr):
    """Writes the beginning of containers; nothing large, deep or of a stranger's class is written out."""

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
