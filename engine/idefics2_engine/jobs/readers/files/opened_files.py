"""The one way to open a file that the operator names, local or remote."""

import os
import stat
from typing import IO

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.readers.files.named_files import Name, is_remote, reading, shown_name
from idefics2_engine.jobs.readers.files.remote_files import open_remote

_BUFFER = 1 << 18


def open_input(name: Name) -> IO[bytes]:
    """Open a regular or a remote file for reading, with its bytes as they are. It can seek.

    A job reads its input several times, so a pipe is refused, without waiting for its writer.

    Raises:
        JobError: There is no such file, or it is not regular.
    """
    if is_remote(name):
        return open_remote(str(name))
    with reading(name):
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return open(fd, "rb", buffering=_BUFFER)
        os.close(fd)
        got = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise JobError(f"{shown_name(name)}: must be a file that can be read twice, got {got}")
