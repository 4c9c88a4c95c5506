"""One spelling of JSON data, for hashes and for rows of output."""

import json

# Rows call these functions, and making an encoder takes longer than using it
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_AS_TEXT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_LEAVES = frozenset((str, int, float, bool, type(None)))


def canonical_json(value: object) -> bytes:
    """Return the JSON of ``value`` with sorted keys and without spaces, as ASCII.

    Raises:
        ValueError: A number is not finite, or a key is not a string.
        TypeError: A value has no JSON.
    """
    _check_keys(value)
    return _CANONICAL.encode(value).encode("ascii")


def encode_row(row: dict[str, object]) -> bytes:
    """Return the JSON object of a row as ``row_text`` does, as ``row_bytes``."""
    return row_bytes(row_text(row))


def row_text(value: object) -> str:
    """Return the JSON of ``value`` in one line, objects in the order of their keys.

    Floats have Python's shortest ``repr``.

    Raises:
        ValueError: A number is not finite, or a key is not a string.
        TypeError: A value has no JSON.
    """
    _check_keys(value)
    return _AS_TEXT.encode(value)


def row_bytes(text: str) -> bytes:
    r"""Return JSON as UTF-8; surrogates, which UTF-8 cannot encode, become ``\udxxx``."""
    return text.encode("utf-8", "backslashreplace")


def _check_keys(value: object) -> None:
    """Raise ``ValueError`` for keys that ``json`` would silently convert to strings."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key must be a string, got {type(key).__name__}")
            if type(child) not in _LEAVES:
                _check_keys(child)
    elif isinstance(value, list | tuple):
        for child in value:
            if type(child) not in _LEAVES:
                _check_keys(child)
