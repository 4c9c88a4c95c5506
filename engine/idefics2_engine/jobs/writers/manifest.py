"""``OUT.manifest.json``: what a job's output was made from and with."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from idefics2_engine import __version__
from idefics2_engine.jobs.store.fingerprint import fingerprint
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.store.job_outputs import WrittenOutput
from idefics2_engine.jobs.writers.row_error import SECRET

_LIBRARIES = (
    *("torch", "triton", "numpy", "pillow", "tokenizers", "safetensors", "jinja2"),
    *("pyarrow", "zstandard", "fsspec", "datasets", "ray"),
)
_HIDDEN = "***"
_SECRET_OPTION = re.compile(
    r"--?(?:[\w-]*[-_])?(?:token|secret|password|passwd|credentials?|auth|key)(?P<value>=.*)?",
    re.IGNORECASE | re.DOTALL,
)
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/?#@\s]*@", re.IGNORECASE)
_QUERY = re.compile(r"(?P<url>\b[a-z][a-z0-9+.-]*://[^?#\s]*)[?#]\S*", re.IGNORECASE)


def manifest_of(
    job: JobDescription,
    output: WrittenOutput,
    *,
    device: Mapping[str, Any],
    command: Sequence[str],
) -> dict[str, Any]:
    """Return the content of a manifest.

    Args:
        job: The job, with its fingerprint's parts.
        output: The complete output.
        device: What is known of the device, JSON data.
        command: The command line. Secrets in it are replaced.
    """
    return {
        "parts": dict(job.parts),
        "accepted": [
            {"fingerprint": fingerprint(parts), "parts": dict(parts)} for parts in job.accepted
        ],
        "inputs": [one._asdict() for one in job.inputs],
        "options": dict(job.options),
        "output": output._asdict(),
        "versions": library_versions(),
        "device": dict(device),
        "command": command_without_secrets(command),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of this package, of Python, and of the libraries that are installed."""
    versions = {"idefics2-engine": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def command_without_secrets(command: Sequence[str]) -> list[str]:
    """Return a command line with ``***`` for values of secret options, and parts of URLs.

    An option is secret if its name ends with a word such as ``token``, ``password`` or ``key``. A
    URL loses its user, query and fragment.
    """
    shown = []
    is_value = False
    for argument in command:
        option = _SECRET_OPTION.fullmatch(argument)
        if is_value:
            shown.append(_HIDDEN)
        elif option and option["value"]:
            shown.append(f"{argument.partition('=')[0]}={_HIDDEN}")
        else:
            text = _USER.sub(rf"\g<scheme>{_HIDDEN}@", argument)
            text = _QUERY.sub(rf"\g<url>?{_HIDDEN}", text)
            shown.append(SECRET.sub(_HIDDEN, text))
        is_value = not is_value and option is not None and option["value"] is None
    return shown
