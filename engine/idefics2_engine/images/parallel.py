"""Parallel reading of images in threads; Pillow releases the GIL to decode and resize."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from PIL import Image

Result = TypeVar("Result")

# Each thread holds an image and its resized copy
_BLOCKS_PER_THREAD = 2

# With many locks, threads seldom wait for each other's objects
_LOCKS = tuple(threading.Lock() for _ in range(256))


def read_all(
    read: Callable[[int], Result], sources: Sequence[object], threads: int
) -> list[Result]:
    """Return ``read(index)`` for each of ``sources``, in order, at most ``threads`` at a time.

    An object that occurs several times is read once. Threads are started for each call, which costs
    less than reading an image.

    Raises:
        Exception: The exception of ``read`` for the first source in order that failed. Reads that
            have not started are canceled, and running ones are not awaited.
    """
    keep_blocks(threads)
    if len(sources) == 1:
        return [read(0)]
    # Maps the id of a source to the first index at which it occurs
    first: dict[int, int] = {}
    for index, source in enumerate(sources):
        first.setdefault(id(source), index)
    indices = list(first.values())
    if min(threads, len(indices)) < 2:
        results = [read(index) for index in indices]
    else:
        with ThreadPoolExecutor(min(threads, len(indices)), "images") as pool:
            futures = [pool.submit(read, index) for index in indices]
            try:
                results = [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    by_index = dict(zip(indices, results, strict=True))
    return [by_index[first[id(source)]] for source in sources]


@contextmanager
def alone_with(*objects: object) -> Iterator[None]:
    """Lock ``objects`` against all threads that use any of them, in this call or in another.

    An open file has one position, and a Pillow image that is not loaded changes while it is read.
    Two threads that read the same one would get errors or each other's bytes. The number of locks
    is fixed, and they are acquired in order, which prevents deadlocks. ``None`` is ignored.
    """
    # Addresses of objects are multiples of 16
    places = sorted({id(one) // 16 % len(_LOCKS) for one in objects if one is not None})
    with ExitStack() as held:
        for place in places:
            held.enter_context(_LOCKS[place])
        yield


def keep_blocks(threads: int) -> None:
    """Let Pillow keep blocks of memory, at most 16 MiB each, for the next images of ``threads``.

    By default Pillow frees every block, and the system clears new pages for each image. Threads
    wait for each other during the page faults. An image of 1280x960 with splitting causes 4,000 of
    them, which take a third of the time.
    """
    memory = Image.core  # type: ignore[attr-defined]
    count = _BLOCKS_PER_THREAD * threads
    if memory.get_blocks_max() < count:
        memory.set_blocks_max(count)
