"""Options of reading a job's input."""

from dataclasses import dataclass
from pathlib import Path

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.field_checks import (
    ListOf,
    MismatchError,
    OneOf,
    OrNone,
    Whole,
    check_fields,
    checked,
    flag,
    path,
    text,
)
from idefics2_engine.jobs.readers.prompt_template import PromptTemplate
from idefics2_engine.jobs.readers.shard import Shard, shard
from idefics2_engine.model_files import read_text

FORMATS = ("auto", "jsonl", "openai", "parquet", "csv", "images", "webdataset")
SAMPLING = "sampling"
"""Column of a row's own sampling parameters."""

# Images in base64 may be in a line
MAX_LINE_BYTES = 64 << 20
# That of the engine, whose module imports more than a command line needs
MAX_MEDIA_BYTES = 256 << 20
_MOST_ROWS = 2**48


def _name(value: object) -> str:
    """Accept a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise MismatchError("a name", short_repr(value))
    return value


def _folder(value: object) -> Path:
    return Path(path(value))


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Validated options of reading.

    Attributes:
        inputs: Files, folders, glob patterns, ``s3://`` and ``gs://`` addresses, and
            ``hf:org/name:split``. Standard input is a file once ``stage_stdin`` has read it.
        input_format: ``"auto"`` is by the name, and for JSONL by the keys of the first row.
        image_column: Column of images. If ``None``, ``images`` in JSONL, and elsewhere ``image`` or
            ``images``.
        prompt_column: Column of the prompt. If ``None``, ``prompt``.
        messages_column: Column of conversations. If ``None``, ``messages``.
        id_column: Column of identifiers. If ``None``, ``id``.
        prompt: Prompt of every row, with names of columns in braces.
        prompt_template: File with such a prompt.
        keep: Columns that the output carries.
        limit: Number of rows, the first ones. All if ``None``.
        sample: Number of rows that are chosen at random, in their order. All if ``None``.
        sample_seed: Determines which rows are chosen.
        shard: Part of the rows, after sampling and limit: ``"i/n"``, or ``"auto"`` for the task of
            an array job of Slurm.
        on_duplicate_id: ``"error"`` reports rows with the same id. ``"suffix"`` gives all but the
            first of them another id.
        media_root: Folder of the images that rows name. If ``None``, the folder of the input.
        hash_media: Whether a row's key depends on the content of image files, and not on their size
            and time of change.
        check_model: Model that OpenAI lines must name. If ``None``, their model is ignored.
        max_media_bytes: Most bytes of an image file that is read for ``hash_media`` or from the hub.
        max_line_bytes: Most bytes of a line of JSONL.

    Raises:
        ConfigError: A value is of the wrong type or out of range, or two contradict each other.
    """

    inputs: tuple[str, ...] = checked(ListOf(_name, "names", least=1, or_one=True))
    input_format: str = checked(OneOf(*FORMATS), "auto")
    image_column: str | None = checked(OrNone(_name), None)
    prompt_column: str | None = checked(OrNone(_name), None)
    messages_column: str | None = checked(OrNone(_name), None)
    id_column: str | None = checked(OrNone(_name), None)
    prompt: str | None = checked(OrNone(text), None)
    prompt_template: Path | None = checked(OrNone(_folder), None)
    keep: tuple[str, ...] = checked(ListOf(_name, "names of columns"), ())
    limit: int | None = checked(OrNone(Whole(1, _MOST_ROWS)), None)
    sample: int | None = checked(OrNone(Whole(1, _MOST_ROWS)), None)
    sample_seed: int = checked(Whole(-(2**63), 2**63 - 1), 0)
    shard: Shard = checked(shard, Shard())
    on_duplicate_id: str = checked(OneOf("error", "suffix"), "error")
    media_root: Path | None = checked(OrNone(_folder), None)
    hash_media: bool = checked(flag, False)
    check_model: str | None = checked(OrNone(_name), None)
    max_media_bytes: int = checked(Whole(1), MAX_MEDIA_BYTES)
    max_line_bytes: int = checked(Whole(1, 1 << 31), MAX_LINE_BYTES)

    def __post_init__(self) -> None:
        """Check every option, then combinations of them."""
        check_fields(self, ConfigError)
        if self.prompt is not None and self.prompt_template is not None:
            raise ConfigError("prompt must come without prompt_template, got both")
        has_prompt = self.prompt is not None or self.prompt_template is not None
        for name in ("prompt_column", "messages_column"):
            if has_prompt and getattr(self, name) is not None:
                raise ConfigError(f"{name} must come without a prompt of the job, got both")
        if self.prompt_column is not None and self.messages_column is not None:
            raise ConfigError("prompt_column must come without messages_column, got both")
        if len(set(self.keep)) < len(self.keep):
            raise ConfigError(f"keep must name each column once, got {short_repr(self.keep)}")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ConfigError(f"media_root must be a folder, got {str(self.media_root)!r}")

    def read_template(self) -> PromptTemplate | None:
        """Return the job's prompt. A byte order mark and the last newline belong to the file.

        Raises:
            ConfigError: The file cannot be read, or braces have something else than a column.
        """
        if self.prompt_template is not None:
            text = read_text(self.prompt_template)
            return PromptTemplate(text.removeprefix("\ufeff").removesuffix("\n"))
        return None if self.prompt is None else PromptTemplate(self.prompt)

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """Columns of a table that may have a use, sorted; a table need not have all of them.

        Raises:
            ConfigError: As in ``read_template``.
        """
        template = self.read_template()
        needed = {self.id_column or "id", SAMPLING, *self.keep}
        needed |= {"image", "images"} if self.image_column is None else {self.image_column}
        if template is None:
            needed |= {self.prompt_column or "prompt", self.messages_column or "messages"}
        else:
            needed |= template.columns
        return tuple(sorted(needed))
