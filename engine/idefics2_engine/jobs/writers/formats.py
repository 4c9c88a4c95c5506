"""The format of an output, by the name of its file and ``--output-format``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.writers.compressed_formats import GzipFormat, ZstdFormat
from idefics2_engine.jobs.writers.openai_format import OpenAiFormat
from idefics2_engine.jobs.writers.output_file import (
    JsonlFormat,
    MakeFormat,
    OutputFile,
    OutputFormat,
)
from idefics2_engine.jobs.writers.parquet_format import ParquetFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions

OUTPUT_FORMATS = ("auto", "openai")
_LINES: dict[str, MakeFormat] = {
    ".jsonl": JsonlFormat,
    ".jsonl.gz": GzipFormat,
    ".jsonl.zst": ZstdFormat,
}
_PARQUET = ".parquet"


def make_format(
    out: Path,
    output_format: str,
    save: SaveOptions,
    *,
    model: str,
    fingerprint: str,
) -> MakeFormat:
    """Return what makes the format of an output.

    Args:
        out: The output, whose name decides.
        output_format: ``auto``, or ``openai`` for result lines of OpenAI's batch interface.
        save: What the rows have besides text.
        model: The model's name in result lines.
        fingerprint: The job's.

    Raises:
        ConfigError: The name or the format is unknown, they do not fit, or a library is missing.
    """
    if output_format not in OUTPUT_FORMATS:
        raise ConfigError(
            f"--output-format must be one of {', '.join(OUTPUT_FORMATS)}, "
            f"got {short_repr(output_format)}"
        )
    if out.name.endswith(_PARQUET):
        if output_format == "openai":
            raise ConfigError(f"--output-format openai must write lines, got {out.name!r}")
        import_extra("pyarrow.parquet", "parquet")
        return partial(ParquetFormat, save=save)
    suffix = next((suffix for suffix in _LINES if out.name.endswith(suffix)), None)
    if suffix is None:
        names = ", ".join((*_LINES, _PARQUET))
        raise ConfigError(f"--output must end with one of {names}, got {out.name!r}")
    if suffix == ".jsonl.zst":
        import_extra("zstandard", "parquet")
    make_lines = _LINES[suffix]
    if output_format != "openai":
        return make_lines

    def make_results(file: OutputFile) -> OutputFormat:
        return OpenAiFormat(make_lines(file), model, fingerprint)

    return make_results


def saved_fields(text: str, output_format: str, keep: Sequence[str] = ()) -> SaveOptions:
    """Return what the rows of a job have besides text.

    OpenAI's result lines have log probabilities where a row asks for them, and nothing else.

    Args:
        text: The value of ``--save``.
        output_format: As in ``make_format``.
        keep: Columns of ``--keep``.

    Raises:
        ConfigError: A name is unknown, or result lines have no place for it.
    """
    save = SaveOptions.parse(text)
    if output_format != "openai":
        return save
    if save not in (SaveOptions(), SaveOptions(logprobs=True)) or keep:
        raise ConfigError(
            "--output-format openai must be without --save and --keep, for which its lines have "
            f"no place, got {short_repr(text or ','.join(keep))}"
        )
    return SaveOptions(logprobs=True)
