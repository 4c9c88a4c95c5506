"""Strict and bounded reading of JSON objects from untrusted files, with typed access."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.model_files import is_there, printable_path, read_file

# The deepest known file, a tokenizer, has 6 levels
_MOST_LEVELS = 64


def read_json(path: Path) -> dict[str, Any]:
    """Parse the JSON object in the file ``path``.

    Raises:
        ConfigError: The file is missing, not a regular file, too large, not UTF-8, not JSON, or too
            deeply nested. Or an object has a key twice, or the top level is not an object.
    """
    return parse_json(read_file(path), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Parse the JSON object in the file ``path``; return an empty dict if there is no file.

    Raises as ``read_json`` does.
    """
    return read_json(path) if is_there(path) else {}


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the JSON object ``content``; errors name the file ``path``.

    Raises as ``read_json`` does.
    """
    file = printable_path(path)
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        raise ConfigError(
            f"{file}: has the key {error.args[0]!r:.80} twice in one object"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file}: is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ConfigError(_too_deep(file)) from None
    # Python limits the digits of an integer
    except ValueError:
        raise ConfigError(f"{file}: has a number with too many digits") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{file}: must hold a JSON object, got {type(parsed).__name__}")
    if not _is_shallow(parsed):
        raise ConfigError(_too_deep(file))
    return parsed


@dataclass(frozen=True)
class Section:
    """A JSON object with typed reads, which raise ``ConfigError``; ``None`` means absent."""

    name: str
    values: Mapping[str, Any]

    def section(self, key: str) -> "Section":
        """Return the object at ``key``, or an empty one if it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return Section(key, value or {})

    def require(self, key: str, *wanted: object) -> None:
        """Raise ``ConfigError`` unless the value is absent or one of ``wanted``."""
        got = self.values.get(key)
        if not any(got == one and type(got) is type(one) for one in (None, *wanted)):
            raise self.error(key, " or ".join(map(repr, wanted)) or "absent", got)

    def size(self, key: str, default: int, most: int) -> int:
        """Return an integer from 1 to ``most``."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise self.error(key, "a positive integer", value)
        if value > most:
            raise self.error(key, f"at most {most}", value)
        return value

    def size_or_none(self, key: str, default: int, most: int) -> int | None:
        """Return ``size``, or ``None`` if the value is ``null``."""
        if key in self.values and self.values[key] is None:
            return None
        return self.size(key, default, most)

    def index(self, key: str, default: int) -> int:
        """Return a token id."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(key, "a token id", value)
        return value

    def positive(self, key: str, default: float) -> float:
        """Return a positive number below 2**63, which is safe in fp32 arithmetic."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 2.0**63:
            raise self.error(key, "a positive number", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a boolean, by default false."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(key, "true or false", value)
        return bool(value)

    def error(self, key: str, wanted: str, got: object) -> ConfigError:
        """Return the error that ``key`` must be ``wanted``, but is ``got``."""
        return ConfigError(f"{self.name}: {key} must be {wanted}, got {short_repr(got)}")


def printable(text: str) -> str:
    """Return a name from a file, or its shortened ``repr`` if it is long or not printable."""
    return text if text.isprintable() and len(text) <= 200 else f"{text!r:.200}"


def _too_deep(file: str) -> str:
    return (
        f"{file}: is nested too deeply: objects and lists must have at most {_MOST_LEVELS} levels"
    )


def _is_shallow(value: dict[str, Any]) -> bool:
    """Return whether ``value`` has few levels; printing and comparing deep ones would fail."""
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return True
    return False


class _RepeatedKeyError(Exception):
    """An object has a key twice, which JSON readers interpret differently."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return read
