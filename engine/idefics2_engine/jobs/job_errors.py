"""Errors of a job's files, with messages for whoever started the job."""

from idefics2_engine.errors import Idefics2Error, short_repr


class JobError(Idefics2Error):
    """The job's folder, its input or its output cannot be used, or shards cannot be merged."""

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
    """The journal or the output cannot be written; the same command continues the job."""

    code = "output_lost"


def input_lost(error: OSError) -> InputLostError:
    """Return the error of an input that cannot be read, with the file if the system named it."""
    name = "" if error.filename is None else f" {short_repr(error.filename)}"
    return InputLostError(f"the input{name} cannot be read: {reason_of(error)}")


def reason_of(error: OSError) -> str:
    """Return why a call of the operating system failed, without the path."""
    return error.strerror or type(error).__name__
