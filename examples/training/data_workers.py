"""Processes that draw and encode training data, in an order that does not depend on their number.

Each job gets a room: memory that was shared before the workers were forked. Pixels, some hundreds
of megabytes a second, are therefore never sent through a pipe.
"""

import mmap
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import AsyncResult
from pathlib import Path

import numpy as np
import torch

from chunks import Bytes, Chunk, ChunkBuilder
from conversations import Preparer
from questions import KINDS, example, question_of_kind

# Examples in a job
_CHUNK = 256
# A worker fills one room while the other is read
_ROOMS_PER_WORKER = 2
# Seconds to wait for an answer. A worker that was killed never sends one.
_PATIENCE = 300.0
# Workers yield to the process that drives the GPU
_NICENESS = 5


@dataclass(frozen=True)
class Job:
    """A job: examples ``start`` to ``stop`` of a seed's name. ``add`` draws one for a builder."""

    add: Callable[[ChunkBuilder, str, int], None]
    name: str
    start: int
    stop: int


def training_jobs(seed: int, number: int, examples: int) -> list[Job]:
    """Return the jobs of round ``number``."""
    return _jobs(add_example, f"training {seed} {number}", examples)


def progress_jobs(per_kind: int) -> list[Job]:
    """Return jobs that draw ``per_kind`` questions of every kind, for tests during training.

    The final evaluation draws other questions.
    """
    return [job for kind in KINDS for job in _jobs(add_question, kind, per_kind)]


def add_example(builder: ChunkBuilder, name: str, place: int) -> None:
    """Draw a training example and all its conversations, with its images split and whole."""
    drawn = example(f"{name} {place}")
    rows = [builder.add_scene(scene) for scene in drawn.scenes]
    for conversation in drawn.conversations:
        builder.add(conversation, rows)


def add_question(builder: ChunkBuilder, kind: str, place: int) -> None:
    """Draw a question of ``kind``, with its images split."""
    scenes, conversation = question_of_kind(kind, f"progress {kind} {place}")
    builder.add(conversation, [builder.add_scene(scene) for scene in scenes], splits=(True,))


def _jobs(add: Callable[[ChunkBuilder, str, int], None], name: str, count: int) -> list[Job]:
    starts = range(0, count, _CHUNK)
    return [Job(add, name, start, min(start + _CHUNK, count)) for start in starts]


class DataWorkers:
    """A pool of processes, forked at once.

    Create it before this process starts CUDA, which the workers do not need.
    """

    def __init__(self, folder: Path, count: int) -> None:
        """Start ``count`` processes for the checkpoint in ``folder``; with 0 this process works."""
        preparer = Preparer(folder)
        tiles = preparer.image_config.tiles_per_image
        scene = tiles * preparer.image_config.longest_edge**2 * 3
        rooms = max(1, count * _ROOMS_PER_WORKER)
        # This is enough for any example. Pages that are never written use no memory.
        size = _CHUNK * 2 * scene
        memory = np.frombuffer(mmap.mmap(-1, rooms * size), dtype=np.uint8).reshape(rooms, size)
        self._rooms: list[Bytes] = list(memory)
        self._stopping = threading.Event()
        self._worker = _Worker(preparer, self._rooms)
        self._pool = None
        if count:
            fork = multiprocessing.get_context("fork")
            self._pool = fork.Pool(count, _start, (self._worker,))

    def chunks(self, jobs: Iterable[Job]) -> Iterator[tuple[Chunk, Bytes]]:
        """Do ``jobs`` and yield their chunks in order, each with the room that holds its pixels.

        A room may be read until the next chunk is requested. Only one caller at a time is allowed.

        Raises:
            multiprocessing.TimeoutError: A chunk was not done after five minutes of waiting.
            RuntimeError: ``stop`` was called.
        """
        if self._pool is None:
            for job in jobs:
                yield self._worker.do(job, 0), self._rooms[0]
            return
        pending: deque[tuple[AsyncResult[Chunk], int]] = deque()
        free = deque(range(len(self._rooms)))
        rest = iter(jobs)
        while True:
            for job in islice(rest, len(free)):
                room = free.popleft()
                pending.append((self._pool.apply_async(_do, (job, room)), room))
            if not pending:
                return
            result, room = pending.popleft()
            chunk = result.get(_PATIENCE)
            if self._stopping.is_set():
                raise RuntimeError("the data workers were closed")
            yield chunk, self._rooms[room]
            free.append(room)

    def stop(self) -> None:
        """Make ``chunks`` end soon; call it from another thread."""
        self._stopping.set()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


class _Worker:
    """The state that a process needs for its jobs."""

    def __init__(self, preparer: Preparer, rooms: list[Bytes]) -> None:
        self._preparer = preparer
        self._rooms = rooms

    def do(self, job: Job, room: int) -> Chunk:
        builder = ChunkBuilder(self._preparer)
        for place in range(job.start, job.stop):
            job.add(builder, job.name, place)
        return builder.chunk(self._rooms[room])


# The worker of this process, if the process is one of a pool
_worker: _Worker | None = None


def _start(worker: _Worker) -> None:
    global _worker
    _worker = worker
    torch.set_num_threads(1)
    os.nice(_NICENESS)


def _do(job: Job, room: int) -> Chunk:
    assert _worker is not None
    return _worker.do(job, room)
