"""The lock of a job's folder, which names its holder."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

from idefics2_engine.jobs.job_errors import JobError, JobInUseError

LOCK = "lock"
_MOST_BYTES = 4096
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Holder(NamedTuple):
    """The process that holds a lock."""

    pid: int
    host: str


class JobLock:
    """An exclusive ``flock`` of a file in ``folder``, acquired on creation.

    The system releases it when the process ends, however it ends. The file stays.

    Raises:
        JobInUseError: Another process holds it, or this one does.
        JobError: The file system has no locks.
        OSError: The file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = _acquire(folder / LOCK)
        try:
            holder = Holder(os.getpid(), socket.gethostname())
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(holder._asdict()).encode(), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.ftruncate(fd, 0)
        except OSError:
            # A full disk must not keep the lock. The next holder replaces the name
            pass
        finally:
            os.close(fd)


def read_holder(folder: Path) -> Holder | None:
    """Return the process that runs the job in ``folder``, without touching the lock.

    A process of this host that has ended is not returned. On another host one that was killed is.
    """
    holder = _named_in(folder / LOCK)
    if holder is None or holder.host != socket.gethostname():
        return holder
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        # It is another user's
        pass
    return holder


def _acquire(path: Path) -> int:
    """Return a descriptor of ``path`` that holds the lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A folder that was moved aside in the meantime took its lock with it
            if os.path.lexists(path) and os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        except OSError as error:
            os.close(fd)
            if error.errno not in _HELD:
                raise JobError(f"{path}: cannot be locked: {error.strerror}") from None
            holder = _named_in(path)
            who = f"process {holder.pid} on {holder.host}" if holder else "another process"
            raise JobInUseError(
                f"{path.parent}: the job is running: {who} holds its lock"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _named_in(path: Path) -> Holder | None:
    """Return the process that the file names; a holder that is just starting may not be named."""
    try:
        with open(path, "rb") as file:
            read = json.loads(file.read(_MOST_BYTES))
        return Holder(int(read["pid"]), str(read["host"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
