"""Regular expressions of modules' names as PEFT matches them, in time linear in the name.

Python's own matching tries every way to share a name among quantifiers, which takes 40 s for
``.*.*b`` and a name of 8,000 characters. Here all ways go through the name together: a Thompson
automaton, whose states are the bits of an integer.
"""

import re
from functools import cache

from idefics2_engine.errors import ConfigError, short_repr

_MOST_CHARACTERS = 200
_MOST_QUANTIFIERS = 2
_ATOM = r"(\\[dw.-]|[\w.-])([*+]?)"  # accepts one character, or some of them


class NamePattern:
    r"""A pattern of a name, or of its end behind a dot: PEFT's ``(.*\.)?(PATTERN)$``.

    It consists of characters, ``.``, ``\d`` and ``\w``, at most two of them with ``*`` or ``+``.
    ``^`` may stand in front of it, and ``$`` behind.
    """

    def __init__(self, pattern: str, where: str) -> None:
        """Compile ``pattern``, a key of the object ``where``.

        Raises:
            ConfigError: It is too long, or consists of something else.
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
        self._starred = 0  # bit i: atom i may be left out and repeated
        for atom, quantifier in atoms:
            if quantifier == "+":  # x+ is x and x*
                self._atoms.append(atom)
            if quantifier:
                self._starred |= 1 << len(self._atoms)
            self._atoms.append(atom)
        self._accepting = cache(self._find_accepting)

    @property
    def is_starred(self) -> bool:
        """Whether names of any length may fit."""
        return self._starred != 0

    def fits(self, name: str) -> bool:
        """Tell whether the pattern fits ``name``, each of whose characters is looked at once."""
        if not self.is_starred:
            begin = len(name) - len(self._atoms)
            may_begin = begin == 0 or (
                begin > 0 and not self._is_anchored and name[begin - 1] == "."
            )
            return may_begin and self._body.fullmatch(name, begin) is not None
        begins = self._skip(1)
        states = begins  # bit i: the first i atoms have been matched
        for character in name:
            moved = states & self._accepting(character)
            states = self._skip((moved & self._starred) | (moved & ~self._starred) << 1)
            if character == "." and not self._is_anchored:
                states |= begins
        return bool(states >> len(self._atoms) & 1)

    def _skip(self, states: int) -> int:
        """Add the states behind atoms that may be left out.

        These are no more than quantifiers in a row.
        """
        for _ in range(_MOST_QUANTIFIERS):
            states |= (states & self._starred) << 1
        return states

    def _find_accepting(self, character: str) -> int:
        """Return the atoms that accept ``character``, as bits."""
        accepts = (re.fullmatch(atom, character) for atom in self._atoms)
        return sum(1 << i for i, accepted in enumerate(accepts) if accepted)
