"""JSON objects from files that came from outside: read strictly and within bounds, their values by type."""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError
from idefics2_engine.shown import shown

_MOST_BYTES = 1 << 26  # 64 MiB; the largest there is, a tokenizer, has 4


def read_json(path: Path) -> dict[str, Any]:
    """Parse the JSON object in the file ``path``.

    Raises:
        ConfigError: The file is missing, no regular file, too large, not UTF-8, not JSON, nested too deeply, names a
            key twice in one object, or holds something else than an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: must be a file")  # reading a pipe would wait for ever
        if status.st_size > _MOST_BYTES:
            raise ConfigError(
                f"{path}: must have at most {_MOST_BYTES} bytes, got {status.st_size}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the JSON object ``content`` of the file ``path``, which errors name; raises as ``read_json`` does."""
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        raise ConfigError(
            f"{path}: has the key {error.args[0]!r:.80} twice in one object"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise ConfigError(f"{path}: has a number with too many digits") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(parsed).__name__}")
    return parsed


@dataclass(frozen=True)
class Section:
    """A JSON object with typed reads, each of which raises ``ConfigError``; ``None`` means absent, as in transformers."""

    name: str
    values: Mapping[str, Any]

    def section(self, key: str) -> "Section":
        """Return the object at ``key``, empty if there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return Section(key, value or {})

    def require(self, key: str, *wanted: object) -> None:
        """Refuse any other value than those ``wanted`` and none."""
        got = self.values.get(key)
        if not any(got == one and type(got) is type(one) for one in (None, *wanted)):
            raise self.error(key, " or ".join(map(repr, wanted)) or "absent", got)

    def size(self, key: str, default: int, most: int) -> int:
        """Return a number of things, from 1 to ``most``."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise self.error(key, "a positive integer", value)
        if value > most:
            raise self.error(key, f"at most {most}", value)
        return value

    def size_or_none(self, key: str, default: int, most: int) -> int | None:
        """Return ``size``, or None where the file says ``null``."""
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
        """Return a number above 0 that arithmetic in fp32 can bear."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 2.0**63:
            raise self.error(key, "a positive number", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false, which is the default."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(key, "true or false", value)
        return bool(value)

    def error(self, key: str, wanted: str, got: object) -> ConfigError:
        """Make the error that names the place, what it must be and what it is."""
        return ConfigError(f"{self.name}: {key} must be {wanted}, got {shown(got)}")


def printable(text: str) -> str:
    """Return a name from a file as it is if a terminal can bear it, else as Python writes it, cut short."""
    return text if text.isprintable() and len(text) <= 200 else f"{text!r:.200}"


class _RepeatedKeyError(Exception):
    """A key stands twice in an object: readers differ in which of them counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return read
