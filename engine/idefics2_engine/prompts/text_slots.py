"""Renderings with slots in the place of typed texts, for conversations of the same structure.

Most templates copy a text and never look at it. Such a template is rendered once for a structure:
roles, and kinds of parts. Each text is then put into its slot. A slot is no string. It raises an
error at each operation that could look at the text, and Jinja's filters, tests and calls refuse it,
so a template that gets through writes the same for any text.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn

LONGEST_TEXT = 2**12
"""Most characters of a text in a slot. A rendering with slots is bounded as if all were so long."""


class SlotError(Exception):
    """A template looked at a text, so it must be rendered with the text itself."""


class SlotPiece(str):
    """The place of a text in the output of a template.

    Attributes:
        number: The number of the text in the conversation.
    """

    __slots__ = ("number",)

    number: int


class Slot:
    """Stands for a text that may only be passed on, or be written as it is.

    Args:
        number: The number of the text in the conversation.
    """

    __slots__ = ("_piece",)

    def __init__(self, number: int) -> None:
        self._piece = SlotPiece()
        self._piece.number = number

    def _refuse(self, *_values: object) -> NoReturn:
        raise SlotError

    # Anything but an attribute of this class, such as the methods of a string
    __getattr__ = _refuse
    __str__ = __repr__ = __format__ = __bool__ = __len__ = __iter__ = __hash__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __getitem__ = __contains__ = __call__ = __index__ = __int__ = __float__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse


class WrittenSlot:
    """A slot where a template writes a value: ``str`` gives the piece, and escaping is refused."""

    __slots__ = ("_piece",)

    def __init__(self, slot: Slot) -> None:
        self._piece = slot._piece

    def __str__(self) -> str:
        """Return the piece itself."""
        return self._piece

    def __html__(self) -> NoReturn:
        """Refuse to be escaped."""
        raise SlotError


def refuse_slots(values: Iterable[object]) -> None:
    """Raise ``SlotError`` if one of ``values`` is a slot or a piece of the output that has one."""
    for value in values:
        if type(value) is Slot or type(value) is SlotPiece:
            raise SlotError


class SlottedText:
    """What a template writes for all conversations of one structure.

    Args:
        pieces: The pieces of the output, in order.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces: list[str] = []
        # Places of slots, and the number of the text of each
        self._slots: list[tuple[int, int]] = []
        literal: list[str] = []
        for piece in pieces:
            if type(piece) is SlotPiece:
                self._slots.append((len(self._pieces) + 1, piece.number))
                self._pieces += ["".join(literal), ""]
                literal = []
            else:
                literal.append(piece)
        self._pieces.append("".join(literal))

    def fill(self, texts: Sequence[str]) -> str:
        """Return the output with each text in its slot."""
        pieces = self._pieces.copy()
        for place, number in self._slots:
            pieces[place] = texts[number]
        return "".join(pieces)
