"""The error of a row in the output: its stage, and a message without what must not leave."""

import re
from pathlib import Path

from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs.job_row import RowError

MOST_CHARACTERS = 500

STAGES = {
    **dict.fromkeys(("json", "encoding", "schema", "unknown_key", "duplicate_key"), "parse"),
    "template": "parse",
    **dict.fromkeys(("prompt", "prompt_too_long", "sampling"), "prepare"),
    **dict.fromkeys(("image", "too_many_images", "media_not_allowed", "media_fetch"), "media"),
    **dict.fromkeys(("request_failed", "internal", "worker_lost", "structured"), "engine"),
}
"""The stage of each code of a row's error."""

# A request is numbered by the order of a run, which is another one after a resume
_REQUEST = re.compile(r"^request \S+: ")
_DATA_URI = re.compile(r"\bdata:[^\s'\",]*,[^\s'\"]*", re.IGNORECASE)
_URL = re.compile(r"([a-z0-9+.-]*)://([^\s'\"<>]*)", re.IGNORECASE)
_BYTES = re.compile(r"(?<![\w'\"])(?:b|bytearray\(b)(['\"])(?:\\.|(?!\1).)*(?:\1\)?|$)")
_MEMORY_ADDRESS = re.compile(r"0x[0-9a-f]{6,}", re.IGNORECASE)
_QUERY = re.compile(r"\?[\w.%~-]+=[^\s'\"]*")
SECRET = re.compile(
    r"\b(?:bearer\s+\S+|hf_\w{16,}|sk-[\w-]{16,}|AKIA\w{12,}"
    r"|(?:api[_-]?key|access[_-]?token|secret|password|passwd|authorization|signature)"
    r"(?:\s*=\s*['\"]?|['\"]\s*:\s*['\"])[^\s'\",}]+)",
    re.IGNORECASE,
)
# A path may have spaces, and ends with its quote, or before ": " if the message begins with it
_ABSOLUTE = r"(?:~?/(?![\s/])|[A-Za-z]:\\|\\\\)"
_PATHS = (
    re.compile(rf"(?P<before>['\"])(?P<path>{_ABSOLUTE}[^'\"]*)(?=['\"]|$)"),
    re.compile(rf"(?P<before>^(?:\w+\[\d+\]: )?)(?P<path>{_ABSOLUTE}.*?)(?=: |$)"),
    re.compile(rf"(?P<before>^|[\s(=:\[])(?P<path>{_ABSOLUTE}[^\s'\",;)\]]*)"),
)


def row_error_of(error: Idefics2Error, media_root: Path | None = None) -> RowError:
    """Return the error of a row; equal errors of equal rows give equal ones.

    Args:
        error: Why the row has no answer. A code that no row can have becomes ``internal``.
        media_root: Files in this folder are named relative to it, others by their last part.
    """
    code = error.code if error.code in STAGES else "internal"
    return make_row_error(code, _REQUEST.sub("", str(error)), media_root)


def make_row_error(code: str, message: str, media_root: Path | None = None) -> RowError:
    """Return an error with the stage of ``code`` and a clean message."""
    return RowError(code, STAGES[code], clean_message(message, media_root))


def clean_message(message: str, media_root: Path | None = None) -> str:
    """Return a message of at most 500 printable characters, which can be shown to anybody.

    It has no absolute paths, addresses in memory, credentials, query strings or contents of files.
    A URL keeps its scheme and host.
    """
    text = message[: 8 * MOST_CHARACTERS]
    if media_root is not None:
        for root in {f"{media_root}/", f"{media_root.absolute()}/", f"{media_root.resolve()}/"}:
            text = text.replace(root, "")
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split())
    text = _DATA_URI.sub("data:…", text)
    text = _URL.sub(_short_url, text)
    text = _BYTES.sub("bytes", text)
    text = _MEMORY_ADDRESS.sub("0x…", text)
    text = _QUERY.sub("?…", text)
    text = SECRET.sub("(secret)", text)
    for path in _PATHS:
        text = path.sub(_short_path, text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _short_url(found: re.Match[str]) -> str:
    place, slash, _ = re.split(r"([/?#]|$)", found[2], maxsplit=1)
    host = place.rpartition("@")[2]
    return f"{found[1]}://{host}{'/…' if slash else ''}"


def _short_path(found: re.Match[str]) -> str:
    name = re.split(r"[/\\]", found["path"].rstrip("/\\ "))[-1].strip()
    return f"{found['before']}…/{name}"
