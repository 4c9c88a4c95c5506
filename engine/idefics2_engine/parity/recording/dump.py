"""Recordings on disk: a JSON file, and a safetensors file for each case.

Every path is recorded to a folder, and only folders are compared. So two machines, two commits or
two libraries are compared like two paths of one process, and memory holds one stage at a time.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idefics2_engine.errors import ConfigError
from idefics2_engine.json_file import read_json
from idefics2_engine.model_files import printable_path
from idefics2_engine.parity.paths import DESCRIPTION
from idefics2_engine.parity.recording.case_recording import CaseRecording
from idefics2_engine.parity.recording.digest import Digest, part_sha256

_FORMAT = 1

Part = Tensor | Digest


@dataclass(frozen=True)
class Recording:
    """A folder with what one path computed.

    Attributes:
        folder: The folder.
        path: The path, as it was given.
        dtype: Name of the dtype that it computed in.
        nf4: Whether its layers were in NF4.
        about: Model, device and versions.
        order: Stages in order.
        cases: What each case is, without stages.
        hashes: SHA-256 of each part of each stage of each case.
        is_digest: Whether only digests of the parts are kept.
    """

    folder: pathlib.Path
    path: str
    dtype: str
    nf4: bool
    about: dict[str, Any]
    order: list[str]
    cases: list[CaseRecording]
    hashes: list[dict[str, list[str]]]
    is_digest: bool

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Recording":
        """Read the description in ``folder``; stages are read when they are asked for.

        Raises:
            ConfigError: There is no recording, or it is of another version.
        """
        file = folder / DESCRIPTION
        values = read_json(file)
        if values.get("format") != _FORMAT:
            raise ConfigError(
                f"{printable_path(file)}: format must be {_FORMAT}, got {values.get('format')!r}"
            )
        try:
            cases = [
                CaseRecording(**{**case, "grids": [(rows, cols) for rows, cols in case["grids"]]})
                for case in values["cases"]
            ]
            return cls(
                folder,
                values["path"],
                values["dtype"],
                values["nf4"],
                values["about"],
                values["order"],
                cases,
                values["sha256"],
                values["digest"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{printable_path(file)}: is no recording of parity") from error

    def describe(self) -> dict[str, Any]:
        """Return path, dtype, model and versions as JSON data."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "nf4": self.nf4,
            "digest": self.is_digest,
            **self.about,
        }

    def parts(self, case: int, stage: str) -> list[Part]:
        """Read the parts of a stage of a case; none if the path has no such stage.

        Raises:
            ConfigError: The file of the case cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        hashes = self.hashes[case].get(stage, [])
        file = _file(self.folder, case)
        parts: list[Part] = []
        try:
            with safe_open(file, framework="pt") as tensors:
                for index, digest in enumerate(hashes):
                    name = f"{stage}/{index}"
                    if not self.is_digest:
                        parts.append(tensors.get_tensor(name))
                        continue
                    norms, samples, shape = (
                        tensors.get_tensor(f"{name}/{kind}")
                        for kind in ("norms", "samples", "shape")
                    )
                    parts.append(Digest(digest, tuple(shape.tolist()), norms, samples))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{printable_path(file)}: cannot be read: {error}") from error
        return parts


def write_recording(
    folder: pathlib.Path,
    path: str,
    dtype: str,
    nf4: bool,
    order: list[str],
    about: dict[str, Any],
    cases: Iterable[CaseRecording],
    *,
    digest: bool = False,
) -> Recording:
    """Write ``cases`` to ``folder`` while they are computed, and return the recording.

    Args:
        folder: A new folder, or an empty one.
        path: The path, as it was given.
        dtype: Name of the dtype that it computes in.
        nf4: Whether its layers are in NF4.
        order: Stages in order. Others of the cases are not written.
        about: Model, device and versions.
        cases: The cases.
        digest: Whether a part is kept as its ``Digest`` only.

    Raises:
        ConfigError: The folder is not empty.
    """
    from safetensors.torch import save_file

    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described, hashes = [], []
    for index, case in enumerate(cases):
        tensors: dict[str, Tensor] = {}
        own: dict[str, list[str]] = {}
        for stage, parts in case.stages.items():
            if stage not in order:
                continue
            own[stage] = []
            for number, part in enumerate(parts):
                name = f"{stage}/{number}"
                part = part.contiguous()
                if digest:
                    found = Digest.of(part)
                    own[stage].append(found.sha256)
                    tensors[f"{name}/norms"] = found.norms
                    tensors[f"{name}/samples"] = found.samples
                    tensors[f"{name}/shape"] = torch.tensor(found.shape)
                else:
                    own[stage].append(part_sha256(part))
                    tensors[name] = part.clone()
        save_file(tensors, _file(folder, index))
        described.append(case.describe())
        hashes.append(own)
    values = {
        "format": _FORMAT,
        "path": path,
        "dtype": dtype,
        "nf4": nf4,
        "about": about,
        "digest": digest,
        "order": order,
        "cases": described,
        "sha256": hashes,
    }
    # Last, so that a folder with a description is whole
    (folder / DESCRIPTION).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return Recording.load(folder)


def check_new(folder: pathlib.Path) -> None:
    """Raise ``ConfigError`` if ``folder`` has anything in it, or is no folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{printable_path(folder)}: must be a new folder or an empty one")


def write_digest(recording: Recording, folder: pathlib.Path) -> Recording:
    """Write the digests of ``recording`` to a new folder, and return that recording."""

    def cases() -> Iterator[CaseRecording]:
        for index, case in enumerate(recording.cases):
            parts = {stage: recording.parts(index, stage) for stage in recording.hashes[index]}
            kept = {
                stage: [part for part in own if isinstance(part, Tensor)]
                for stage, own in parts.items()
            }
            yield replace(case, stages=kept)

    return write_recording(
        folder,
        recording.path,
        recording.dtype,
        recording.nf4,
        recording.order,
        recording.about,
        cases(),
        digest=True,
    )


def _file(folder: pathlib.Path, case: int) -> pathlib.Path:
    return folder / f"case-{case:04d}.safetensors"
