"""The operating system's calls of a job, which count those that wait for the disk."""

import time

from idefics2_engine.jobs.store.file_operations import FileOperations


class CountedFiles(FileOperations):
    """Counts syncs of files and their seconds."""

    def __init__(self) -> None:
        self.syncs = 0
        self.sync_seconds = 0.0

    def sync(self, fd: int) -> None:
        """Wait until the content is on the disk."""
        begin = time.perf_counter()
        super().sync(fd)
        self.sync_seconds += time.perf_counter() - begin
        self.syncs += 1

    @property
    def figures(self) -> dict[str, float]:
        """The counts, for a row of results."""
        return {"syncs": self.syncs, "sync_seconds": self.sync_seconds}
