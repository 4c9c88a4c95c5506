"""Regular expressions of modules' names as PEFT matches them, in time linear in the name.

Python's matching tries every way to divide a name among quantifiers. For ``.*.*b`` and a name of
8,000 characters this takes 40 s. Here an automaton follows all ways at once (Thompson, 1968). Its
set of states is the bits of an integer.
"""

import re
from functools import cache

from idefics2_engine.errors import ConfigError, short_repr

_MOST_CHARACTERS = 200
_MOST_QUANTIFIERS = 2
# An atom accepts one character. A quantifier may follow it
_ATOM = r"(\\[dw.-]|[\w.-])([*+]?)"


class NamePattern:
    r"""A pattern of a whole name or of its end after a dot: ``(.*\.)?(PATTERN)$``, as in PEFT.

    It is a sequence of ASCII letters, digits, ``_``, ``-``, ``.``, ``\.``, ``\-``, ``\d`` and
    ``\w``. At most two of these have a quantifier, ``*`` or ``+``. A pattern may begin with ``^``
    and end with ``$``.
    """

    def __init__(self, pattern: str, where: str) -> None:
        """Compile ``pattern``, a key of the JSON object called ``where`` in errors.

        Raises:
            ConfigError: The pattern is too long, has too many quantifiers or has another form.
        """
        self.pattern = pattern
        body = pattern.removeprefix("^").removesuffix("$")
        atoms = re.findall(_ATOM, body, re.ASCII)
        if (
            not re.fullmatch(f"(?:{_ATOM})+", body, re.ASCII)
            or len(pattern) > _MOST_CHARACTERS
            or sum(bool(quantifier) for _, quantifier in atoms) > _MOST_QUANTIFIERS
        ):
            raise ConfigError(
                f"{where}: keys must be names of modules, of at most {_MOST_CHARACTERS} characters "
                f"and with * or + at most twice, got {short_repr(pattern)}"
            )
        self._is_anchored = pattern.startswith("^")
        self._body = re.compile(body)
        self._atoms: list[str] = []
        # Bit i is set if atom i may be skipped and repeated
        self._starred = 0
        for atom, quantifier in atoms:
            # x+ is stored as x followed by x*
            if quantifier == "+":
                self._atoms.append(atom)
            if quantifier:
                self._starred |= 1 << len(self._atoms)
            self._atoms.append(atom)
        self._accepting = cache(self._find_accepting)

    @property
    def is_starred(self) -> bool:
        """Whether the pattern has a quantifier, so that the length of a match varies."""
        return self._starred != 0

    def fits(self, name: str) -> bool:
        """Return whether the pattern fits ``name``, in time linear in its length."""
        if not self.is_starred:
            begin = len(name) - len(self._atoms)
            may_begin = begin == 0 or (
                begin > 0 and not self._is_anchored and name[begin - 1] == "."
            )
            return may_begin and self._body.fullmatch(name, begin) is not None
        begins = self._skip(1)
        # Bit i is set if the first i atoms match a part of the name that ends here
        states = begins
        for character in name:
            moved = states & self._accepting(character)
            states = self._skip((moved & self._starred) | (moved & ~self._starred) << 1)
            if character == "." and not self._is_anchored:
                states |= begins
        return bool(states >> len(self._atoms) & 1)

    def _skip(self, states: int) -> int:
        """Add the states that skipping starred atoms leads to.

        There are at most as many starred atoms in a row as quantifiers.
        """
        for _ in range(_MOST_QUANTIFIERS):
            states |= (states & self._starred) << 1
        return states

    def _find_accepting(self, character: str) -> int:
        """Return the atoms that accept ``character``: bit i is set if atom i does."""
        accepts = (re.fullmatch(atom, character) for atom in self._atoms)
        return sum(1 << i for i, accepted in enumerate(accepts) if accepted)
