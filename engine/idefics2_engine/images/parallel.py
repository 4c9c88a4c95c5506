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

# Many, so that threads seldom wait for each other's objects
_LOCKS = tuple(threading.Lock() for _ in range(256))


def read_all(
    read: Callable[[int], Result], sources: Sequence[object], threads: int
) -> list[Result]:
    """Return ``read(index)`` for each of ``sources``, in order, at most ``threads`` at a time.

    An object that is among them several times is read once, which is cheaper. The threads live as
    long as the call, which costs less than an image.

    Raises:
        Exception: What ``read`` raised for the first source that failed; the rest is abandoned.
    """
    _keep_blocks(_BLOCKS_PER_THREAD * threads)
    first: dict[int, int] = {}  # id of a source -> where it comes first
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
    """Keep other threads away that want any of the same ``objects``, whatever call they belong to.

    An open file has one position, and a Pillow image that is not loaded changes while it is read:
    two threads that read one would get errors or each other's bytes. The locks are fixed in number
    and taken in order, so that no two threads wait for each other.
    """
    # Objects lie at multiples of 16
    places = sorted({id(one) // 16 % len(_LOCKS) for one in objects if one is not None})
    with ExitStack() as held:
        for place in places:
            held.enter_context(_LOCKS[place])
        yield


def _keep_blocks(count: int) -> None:
    """Let Pillow keep ``count`` blocks of memory, 16 MiB each at most, for its next images.

    By default it gives every block back, and the system clears its pages anew for each image: 4,000
    page faults for one of 1280x960 with splitting, a third of the time, during which threads wait
    for each other.
    """
    memory = Image.core  # type: ignore[attr-defined]
    if memory.get_blocks_max() < count:
        memory.set_blocks_max(count)
