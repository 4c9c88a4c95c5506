"""The hash of everything that a job's output depends on, and what differs between two of them."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from idefics2_engine.jobs.store.canonical_json import canonical_json

_MOST_CHARACTERS = 40
_ABSENT = "(absent)"


class Difference(NamedTuple):
    """A part that differs: its dotted name, and its values in the journal and now."""

    name: str
    journal: str
    now: str


def fingerprint(parts: Mapping[str, object]) -> str:
    """Return the SHA-256 of named parts, which are JSON data, in hex.

    Raises:
        ValueError: A number is not finite, or a key is not a string.
        TypeError: A value has no JSON.
    """
    return hashlib.sha256(canonical_json(dict(parts))).hexdigest()


def differences(journal: Mapping[str, object], now: Mapping[str, object]) -> list[Difference]:
    """Return the parts that differ, sorted by name; parts of an object are named ``part.key``.

    ``1``, ``1.0`` and ``true`` differ, as they do in the fingerprint.
    """
    before, after = dict(_leaves("", journal)), dict(_leaves("", now))
    return [
        Difference(name, _shown(before.get(name)), _shown(after.get(name)))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def difference_table(rows: list[Difference]) -> str:
    """Return the differences as lines with aligned columns under *name, journal, now*."""
    table = [Difference("name", "journal", "now"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield name and JSON of everything in ``value`` that is not an object with content."""
    if isinstance(value, Mapping) and (value or not name):
        for key, child in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, child)
    else:
        yield name, canonical_json(value).decode("ascii")


def _shown(text: str | None) -> str:
    """Return ``text``; a long one is cut, and a hash shows that two of them differ."""
    if text is None:
        return _ABSENT
    if len(text) <= _MOST_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:8]
    return f"{text[: _MOST_CHARACTERS - 10]}… {digest}"
