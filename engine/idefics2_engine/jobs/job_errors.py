"""Errors of a job's files, with messages for whoever started the job."""

from idefics2_engine.errors import Idefics2Error


class JobError(Idefics2Error):
    """The job's folder or its output cannot be used."""

    code = "job"


class JobInUseError(JobError):
    """Another process runs this job."""

    code = "job_in_use"


class FingerprintError(JobError):
    """The job was begun with other options, another model or another version."""

    code = "fingerprint"
