"""Errors of a job's files, with messages for whoever started the job."""

from idefics2_engine.errors import Idefics2Error


class JobError(Idefics2Error):
    """The job's folder, its input or its output cannot be used."""

    code = "job"


class JobInUseError(JobError):
    """Another process runs this job."""

    code = "job_in_use"


class FingerprintError(JobError):
    """The job was begun with other options, another model or another version."""

    code = "fingerprint"


class InputLostError(JobError):
    """The input cannot be read any further."""

    code = "input_lost"


class OutputLostError(JobError):
    """The journal or the output cannot be written; the job can be resumed."""

    code = "output_lost"


def reason_of(error: OSError) -> str:
    """Return why a call of the operating system failed, without the path."""
    return error.strerror or type(error).__name__
