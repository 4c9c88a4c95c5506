"""Many images at once: Pillow decodes and resizes without holding up other threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def read_all(
    read: Callable[[int], Result], sources: Sequence[object], threads: int
) -> list[Result]:
    """Return ``read(index)`` for each of ``sources``, in order, at most ``threads`` at a time.

    An object that is among them several times is read once: that is cheaper, and two threads must
    not load one Pillow image. The threads live as long as the call, which costs less than an image.

    Raises:
        Exception: What ``read`` raised for the first source that failed; the rest is abandoned.
    """
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
