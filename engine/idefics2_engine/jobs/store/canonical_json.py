"""One spelling of JSON data, for hashes and for rows of output."""

import json


def canonical_json(value: object) -> bytes:
    """Return the JSON of ``value`` with sorted keys and without spaces, as ASCII.

    Raises:
        ValueError: A number is not finite, or a key is not a string.
        TypeError: A value has no JSON.
    """
    _check_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def encode_row(row: dict[str, object]) -> bytes:
    r"""Return the JSON object of a row, in the order of its keys, as UTF-8 in one line.

    Surrogates, which UTF-8 cannot encode, are written as ``\udxxx``. Floats have Python's shortest
    ``repr``.

    Raises:
        ValueError: A number is not finite, or a key is not a string.
        TypeError: A value has no JSON.
    """
    _check_keys(row)
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def _check_keys(value: object) -> None:
    """Raise ``ValueError`` for keys that ``json`` would silently convert to strings."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key must be a string, got {type(key).__name__}")
            _check_keys(child)
    elif isinstance(value, list | tuple):
        for child in value:
            _check_keys(child)
