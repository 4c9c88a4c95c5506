"""Worker processes that decode image files beside the engine, outside Python's lock.

A thread of the engine takes an idle worker, sends it a file, and waits for the tiles. Their
pixels lie in shared memory, where the copy to the device starts. Tiles that outlive the room there
are copied out of it, so no worker ever waits for a tile to be freed.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from math import prod
from queue import Empty, SimpleQueue
from typing import Any

from idefics2_engine.errors import ImageError
from idefics2_engine.images.file_tiles import FileTiles, TileRules
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.tiling import Tile
from idefics2_engine.images.workers.shared_memory import Block, SharedMemory
from idefics2_engine.images.workers.worker import aligned, job
from idefics2_engine.images.workers.worker_process import WorkerEndedError, WorkerProcess

Pin = Callable[[int, int], Callable[[], None] | None]
"""Pins memory, given its address and size, and returns a function that undoes it.

``None`` if the memory cannot be pinned.
"""

# About 500 images of 980 x 735, as many as a job has in flight
POOL_BYTES = 1 << 30
# Memory is pinned in parts, so that the first images need not wait for the last part
_PIN_BYTES = 1 << 26
_PIN_GAP = 4096
_MOST_WORKERS = 8

_logger = logging.getLogger(__name__)


class WorkerPool:
    """Worker processes with one shared memory. All methods are thread-safe.

    Args:
        count: Processes, at least one.
        image_bytes: Bytes of all tiles of one image, at most.
        pool_bytes: Bytes of shared memory for tiles in use.
        pin: Pins the memory for faster copies to the device. If ``None``, it stays as it is.

    Attributes:
        count: Processes.
    """

    def __init__(
        self, count: int, image_bytes: int, pool_bytes: int = POOL_BYTES, pin: Pin | None = None
    ) -> None:
        self.count = count
        self._image_bytes = image_bytes
        self._pool_bytes = pool_bytes
        self._pin = pin
        self._owner = os.getpid()
        # It is never held while something is waited for, except the start of a process
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_closed = False
        self._memory: SharedMemory | None = None
        self._workers: set[WorkerProcess] = set()
        # Idle workers; None if there are none and will be none
        self._idle: SimpleQueue[WorkerProcess | None] = SimpleQueue()
        self._unpin: list[Callable[[], None]] = []
        # Set when a worker is ready, and when all are
        self._has_worker = threading.Event()
        self._has_all = threading.Event()

    @property
    def is_running(self) -> bool:
        """Whether there are workers, of which one may be idle."""
        return self._has_worker.is_set() and not self._is_closed and os.getpid() == self._owner

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    @property
    def num_free_bytes(self) -> int:
        """Bytes of shared memory that no tile is in."""
        with self._lock:
            return 0 if self._memory is None else self._memory.num_free

    def start(self) -> None:
        """Start the processes, once, without waiting for them."""
        with self._lock:
            has_begun, self._has_begun = self._has_begun, True
        if not has_begun and not self._is_closed and os.getpid() == self._owner:
            threading.Thread(target=self._start, name="idefics2-start-workers", daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all workers are ready; return whether there is one."""
        self._has_all.wait(timeout)
        return self.is_running

    def tiles(self, data: bytes, name: str, rules: TileRules) -> FileTiles | None:
        """Return the tiles of an image file, or ``None`` if there are no workers.

        Args:
            data: The file.
            name: What messages call it.
            rules: See ``TileRules``.

        Raises:
            ImageError: As in ``file_tiles``, or the worker ended before it was done.
        """
        worker = self._take_idle()
        if worker is None:
            return None
        block = self._take_block()
        try:
            reply = worker.ask(job(name, rules, *(block or worker.spare)), data)
        except WorkerEndedError as ended:
            self._release(block)
            self._start_another(worker)
            raise ImageError(
                f"{name}: could not be decoded: the process that decoded it ended with {ended}"
            ) from None
        except BaseException:
            # An interrupt: the reply would be taken for that to the next job
            worker.kill()
            self._release(block)
            self._start_another(worker)
            raise
        try:
            return self._file_tiles(reply, name, rules, block, worker.spare)
        finally:
            self._give_back(worker)

    def close(self) -> None:
        """End the processes and wait for their end; idempotent.

        Whoever waits for tiles gets an error. Tiles that were made stay valid.
        """
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._is_closed = True
            workers, self._workers = self._workers, set()
            memory, self._memory = self._memory, None
            unpin, self._unpin = self._unpin, []
        for worker in workers:
            worker.kill()
        # Others are closed by the threads that wait for them
        while (idle := _next(self._idle)) is not None:
            idle.end()
        self._idle.put(None)
        self._has_all.set()
        for undo in unpin:
            undo()
        if memory is not None:
            memory.close()

    def _start(self) -> None:
        spare_bytes = aligned(self._image_bytes)
        spares = self.count * spare_bytes
        # Whole pages, so that the rest can be pinned
        spares = -(-spares // _PIN_BYTES) * _PIN_BYTES
        try:
            memory = SharedMemory(spares + self._pool_bytes)
        except (OSError, AttributeError) as error:
            self._give_up(f"no shared memory: {error}")
            return
        with self._lock:
            if self._is_closed:
                memory.close()
                return
            self._memory = memory
        starting = [
            worker
            for index in range(self.count)
            if (worker := self._spawn((index * spare_bytes, (index + 1) * spare_bytes)))
        ]
        # Pinning takes as long as the processes take to start
        add = threading.Thread(target=self._add_memory, args=(spares, memory), daemon=True)
        add.start()
        for worker in starting:
            self._add_when_ready(worker)
        self._give_up_if_none_is_left()
        self._has_all.set()
        add.join()

    def _add_memory(self, begin: int, memory: SharedMemory) -> None:
        """Pin the memory behind the spare room, and let tiles be written to it."""
        for at in range(begin, memory.size, _PIN_BYTES):
            end = min(at + _PIN_BYTES, memory.size)
            undo = None if self._pin is None else self._pin(memory.address + at, end - at)
            with self._lock:
                is_closed = self._is_closed
                if undo is not None and not is_closed:
                    self._unpin.append(undo)
            if is_closed:
                if undo is not None:
                    undo()
                return
            if undo is None and self._pin is not None:
                _logger.warning("image workers: %d MiB could be pinned", (at - begin) >> 20)
                # The rest is used as it is
                self._pin = None
            # The gap keeps blocks within a part. CUDA copies from one pinned range at a time
            memory.add((at, end - _PIN_GAP))

    def _spawn(self, spare: Block) -> WorkerProcess | None:
        """Start a process, unless the pool is closed or the system refuses."""
        with self._lock:
            if self._is_closed or self._memory is None:
                return None
            try:
                worker = WorkerProcess(self._memory, spare)
            except OSError as error:
                _logger.warning("image workers: a process cannot be started: %s", error)
                return None
            self._workers.add(worker)
            return worker

    def _add_when_ready(self, worker: WorkerProcess) -> None:
        try:
            worker.wait_until_ready()
        except WorkerEndedError as ended:
            with self._lock:
                self._workers.discard(worker)
            if not self._is_closed:
                _logger.warning("image workers: a process ended while it started, with %s", ended)
            return
        self._idle.put(worker)
        self._has_worker.set()

    def _start_another(self, worker: WorkerProcess) -> None:
        """Start another process in place of one that ended, without waiting for it."""
        with self._lock:
            self._workers.discard(worker)

        def start() -> None:
            other = self._spawn(worker.spare)
            if other is not None:
                self._add_when_ready(other)
            self._give_up_if_none_is_left()

        if not self._is_closed:
            _logger.warning("image workers: process %d ended, another one starts", worker.pid)
            threading.Thread(target=start, name="idefics2-start-workers", daemon=True).start()

    def _give_up_if_none_is_left(self) -> None:
        with self._lock:
            is_last = not self._workers
        if is_last:
            self._give_up("none is left")

    def _give_up(self, reason: str) -> None:
        if not self._is_closed:
            _logger.warning("image workers: images are decoded in threads: %s", reason)
        self.close()

    def _take_idle(self) -> WorkerProcess | None:
        if not self.is_running:
            return None
        worker = self._idle.get()
        if worker is None or self._is_closed:
            # The next one who waits is told as well
            self._idle.put(None)
            return None
        return worker

    def _give_back(self, worker: WorkerProcess) -> None:
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._idle.put(worker)
        if is_closed:
            worker.end()

    def _take_block(self) -> Block | None:
        with self._lock:
            return None if self._memory is None else self._memory.take(aligned(self._image_bytes))

    def _release(self, block: Block | None) -> None:
        with self._lock:
            if block is not None and self._memory is not None:
                self._memory.add(block)

    def _file_tiles(
        self,
        reply: dict[str, Any],
        name: str,
        rules: TileRules,
        block: Block | None,
        spare: Block,
    ) -> FileTiles:
        """Return what a worker has written, in place if it wrote to the shared room."""
        memory = self._memory
        if memory is None or "tiles" not in reply:
            self._release(block)
            if "error" in reply:
                raise ImageError(reply["error"])
            reason = reply.get("failure", "the model was closed")
            raise ImageError(f"{name}: could not be decoded: {reason}")
        shapes = [tuple(tile["shape"]) for tile in reply["tiles"]]
        sizes = [aligned(height * width * channels) for height, width, channels in shapes]
        used = sum(sizes)
        assert len(shapes) == rules.image_config.tiles_per_image
        assert used <= aligned(self._image_bytes)
        if block is None:
            pixels = memory.array((spare[0], spare[0] + used)).copy()
        else:
            begin, end = block
            self._release((begin + used, end))
            pixels = memory.owner((begin, begin + used))
        tiles, at = [], 0
        for tile, shape, size in zip(reply["tiles"], shapes, sizes, strict=True):
            array = pixels[at : at + prod(shape)].reshape(shape)
            array.setflags(write=False)
            fingerprint = bytes.fromhex(tile["fingerprint"])
            tiles.append(Tile(array, rules.patch_size, rules.grid_side, fingerprint))
            at += size
        warnings = tuple(reply["info"].pop("warnings"))
        return FileTiles(tiles, ImageInfo(**reply["info"], warnings=warnings))


def _next(queue: SimpleQueue[WorkerProcess | None]) -> WorkerProcess | None:
    """Return the first worker of the queue, ``None`` if it has none."""
    with contextlib.suppress(Empty):
        return queue.get_nowait()
    return None


def default_workers() -> int:
    """Return as many workers as there are cores besides the engine's, from 1 to 8."""
    # The cores that this process may use; the scheduler of a cluster may have given it a few
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_WORKERS, (usable or 1) - 1))
