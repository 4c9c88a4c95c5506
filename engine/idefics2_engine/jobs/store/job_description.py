"""What ``job.json`` says of a job: its fingerprint's parts, its input and its options."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.store.canonical_json import canonical_json
from idefics2_engine.jobs.store.fingerprint import fingerprint
from idefics2_engine.jobs.store.input_files import InputFile
from idefics2_engine.json_file import read_json
from idefics2_engine.model_files import printable_path

JOB_JSON = "job.json"
_VERSION = 1


@dataclass(frozen=True)
class JobDescription:
    """A job as it was begun or resumed last.

    Attributes:
        parts: Named parts of the fingerprint, JSON data.
        inputs: The input files.
        options: Options that the output does not depend on, JSON data.
        accepted: Parts of earlier fingerprints under which rows in the journal were computed.
    """

    parts: Mapping[str, Any]
    inputs: tuple[InputFile, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    accepted: tuple[Mapping[str, Any], ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parts, in hex."""
        return fingerprint(self.parts)

    def encode(self) -> bytes:
        """Return the content of ``job.json``.

        Raises:
            ValueError: A number is not finite, or a key is not a string.
            TypeError: A value has no JSON.
        """
        # Indented for readers, after the check of what JSON would change silently
        content = json.loads(
            canonical_json(
                {
                    "v": _VERSION,
                    "fingerprint": self.fingerprint,
                    "parts": dict(self.parts),
                    "inputs": [one._asdict() for one in self.inputs],
                    "options": dict(self.options),
                    "accepted": [dict(one) for one in self.accepted],
                }
            )
        )
        return json.dumps(content, indent=1, sort_keys=True).encode("ascii") + b"\n"


def read_description(folder: Path) -> JobDescription:
    """Read the ``job.json`` of a job's folder.

    Raises:
        JobError: It is missing, damaged, or of another version.
    """
    path = folder / JOB_JSON
    try:
        content = read_json(path)
    except ConfigError as error:
        raise JobError(str(error)) from None
    if content.get("v") != _VERSION:
        raise JobError(
            f"{printable_path(path)}: v must be {_VERSION}, got {short_repr(content.get('v'))}"
        )
    try:
        found = JobDescription(
            parts=dict(content["parts"]),
            inputs=tuple(InputFile(**one) for one in content["inputs"]),
            options=dict(content["options"]),
            accepted=tuple(dict(one) for one in content["accepted"]),
        )
        is_whole = found.fingerprint == content["fingerprint"]
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise JobError(
            f"{printable_path(path)}: must be as the job wrote it, got other fields; "
            "--restart begins again and keeps the folder"
        )
    return found
