"""The format of an output, from the description of its job."""

from pathlib import Path

from idefics2_engine.jobs.merge import whole_fingerprint
from idefics2_engine.jobs.store.job_description import JobDescription
from idefics2_engine.jobs.writers.formats import make_format
from idefics2_engine.jobs.writers.output_file import JsonlFormat, MakeFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions


def format_of(out: Path, job: JobDescription) -> MakeFormat:
    """Return what makes the format of ``out``; a shard has that of the whole job.

    Raises:
        ConfigError: The name and the format do not fit, or a library is missing.
    """
    output = job.parts.get("output")
    # A program that makes jobs of its own may say nothing
    if output is None:
        return JsonlFormat
    return make_format(
        out,
        output["format"],
        SaveOptions(**output["save"]),
        model=job.options["model"],
        fingerprint=whole_fingerprint(job.parts),
    )
