"""Free parts of the shared memory."""

import random

from idefics2_engine.images.workers.shared_memory import Block, FreeRanges

SIZE = 500


def test_free_ranges_are_those_that_nobody_has() -> None:
    rng = random.Random(0)
    free, taken = FreeRanges(), list[Block]()
    assert free.take(1) is None
    free.add((0, SIZE))
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            begin, end = taken.pop(rng.randrange(len(taken)))
            # A part may be freed before the rest
            middle = rng.randint(begin, end)
            free.add((middle, end))
            free.add((begin, middle))
        size = rng.randint(1, 60)
        block = free.take(size)
        held = {at for begin, end in taken for at in range(begin, end)}
        if block is None:
            # No gap is as large
            text = "".join("x" if at in held else "." for at in range(SIZE))
            assert "." * size not in text
            continue
        begin, end = block
        assert end - begin == size
        assert held.isdisjoint(range(begin, end))
        taken.append(block)
        assert free.num_free == SIZE - sum(end - begin for begin, end in taken)
    for one in taken:
        free.add(one)
    assert free.take(SIZE) == (0, SIZE)
