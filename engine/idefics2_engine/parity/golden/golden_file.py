"""The format of golden files: prompts, the names of their pictures, and the answers."""

import pathlib
from dataclasses import MISSING, dataclass, fields
from typing import Any

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.field_checks import (
    ListOf,
    Number,
    OrNone,
    Whole,
    check,
    check_fields,
    checked,
    flag,
    text,
)
from idefics2_engine.json_file import read_json
from idefics2_engine.model_files import printable_path

_HERE = pathlib.Path(__file__).resolve().parent
_FORMAT = 1
_KEYS = {"format", "model", "about", "images", "cases"}

PACKAGED = tuple(sorted(file.stem for file in _HERE.glob("*.json")))
"""Names of the golden files that are part of the package."""


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A prompt and its answer.

    Attributes:
        name: Name of the case.
        prompt: A raw prompt with ``<image>`` for each picture.
        images: File names of the pictures.
        split: Whether pictures are split. If ``None``, the checkpoint decides.
        longest_edge: Pixels to which pictures are scaled down. If ``None``, the checkpoint decides.
        token_ids: First tokens of the answer. If empty, ``texts`` are compared.
        logprobs: Log probabilities of ``token_ids``, or none.
        texts: Answers, of which one must be given. Blanks around them are ignored.
        max_tokens: Most tokens of an answer; by default as many as ``token_ids``.
        dtype: The dtype that the answer was computed in.
        quantization: Quantization of the weights, such as ``nf4``.
        source: Where the answer is from.
        note: What else must be known.
    """

    name: str = checked(text)
    prompt: str = checked(text)
    images: tuple[str, ...] = checked(ListOf(text, "file names"), ())
    split: bool | None = checked(OrNone(flag), None)
    longest_edge: int | None = checked(OrNone(Whole(1)), None)
    token_ids: tuple[int, ...] = checked(ListOf(Whole(0), "token ids"), ())
    logprobs: tuple[float, ...] = checked(ListOf(Number(-1e9, 0.0), "numbers"), ())
    texts: tuple[str, ...] = checked(ListOf(text, "texts"), ())
    max_tokens: int | None = checked(OrNone(Whole(1)), None)
    dtype: str | None = checked(OrNone(text), None)
    quantization: str | None = checked(OrNone(text), None)
    source: str | None = checked(OrNone(text), None)
    note: str | None = checked(OrNone(text), None)

    def __post_init__(self) -> None:  # noqa: D105
        check_fields(self, ConfigError)
        if not self.token_ids and not (self.texts and self.max_tokens):
            raise ConfigError("token_ids, or texts and max_tokens, must be given, got neither")
        if self.logprobs and len(self.logprobs) != len(self.token_ids):
            raise ConfigError(
                f"logprobs must be one for each of {len(self.token_ids)} token_ids, "
                f"got {len(self.logprobs)}"
            )

    @property
    def num_tokens(self) -> int:
        """Most tokens of an answer that are compared."""
        return len(self.token_ids) or self.max_tokens or 0


@dataclass(frozen=True)
class GoldenFile:
    """A golden file.

    Attributes:
        path: The file.
        model: Id of the model on the hub, if it is known.
        images: Where each picture is published, by its file name.
        cases: The cases.
    """

    path: pathlib.Path
    model: str | None
    images: dict[str, str]
    cases: tuple[GoldenCase, ...]

    @classmethod
    def load(cls, name: str | pathlib.Path) -> "GoldenFile":
        """Read a golden file, or the packaged one of this name.

        Raises:
            ConfigError: The file cannot be read or is malformed.
        """
        path = pathlib.Path(name).expanduser()
        if str(name) in PACKAGED and not path.exists():
            path = _HERE / f"{name}.json"
        values = read_json(path)
        shown = printable_path(path)
        if values.get("format") != _FORMAT:
            raise ConfigError(f"{shown}: format must be {_FORMAT}, got {values.get('format')!r}")
        unknown = values.keys() - _KEYS
        if unknown:
            raise ConfigError(f"{shown}: unknown key {short_repr(min(unknown))}")
        images = values.get("images", {})
        if not isinstance(images, dict) or not all(isinstance(v, str) for v in images.values()):
            raise ConfigError(f"{shown}: images must be an object of texts")
        cases = values.get("cases")
        if not isinstance(cases, list) or not cases:
            raise ConfigError(f"{shown}: cases must be a list of one or more, got {cases!r:.80}")
        read = tuple(_case(shown, index, values) for index, values in enumerate(cases))
        names = [case.name for case in read]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{shown}: names must differ, got {short_repr(min(twice))} twice")
        model = check(f"{shown}: model", values.get("model"), OrNone(text), ConfigError)
        return cls(path, model, images, read)


def _case(file: str, index: int, values: Any) -> GoldenCase:
    where = f"{file}: case {index}"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be an object, got {short_repr(values)}")
    known = {field.name: field for field in fields(GoldenCase)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {short_repr(name)}")
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise ConfigError(f"{where}: must have {name}, got none")
    try:
        return GoldenCase(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
