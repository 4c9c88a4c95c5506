"""The order of waiting items, and the bounds on how long one waits."""

import random

from idefics2_engine.scheduling.admission import AdmissionPolicy
from idefics2_engine.scheduling.waiting_queue import WaitingQueue


def drain(queue: WaitingQueue[str]) -> str:
    order = ""
    while (item := queue.next()) is not None:
        order += item
        queue.take(item)
    return order


def queue_of(lengths: dict[str, int | None], patience: int = 100) -> WaitingQueue[str]:
    queue: WaitingQueue[str] = WaitingQueue(patience)
    for item, length in lengths.items():
        queue.add(item, length)
    return queue


def test_the_longest_is_next_and_equal_ones_keep_their_order() -> None:
    assert drain(queue_of({"a": 3, "b": 9, "c": 3, "d": 9, "e": 1})) == "bdace"


def test_without_patience_the_queue_is_first_come_first_served() -> None:
    assert drain(queue_of({"a": 3, "b": 9, "c": 5}, patience=0)) == "abc"


def test_nobody_overtakes_an_item_that_may_not_be_overtaken() -> None:
    assert drain(queue_of({"a": 3, "b": 9, "c": None, "d": 5, "e": 6})) == "abced"
    queue = queue_of({"a": 3, "b": 9, "c": None})
    queue.remove("c")
    assert not queue.is_fixed
    assert drain(queue) == "ba"


def test_preempted_items_are_first() -> None:
    queue = queue_of({"a": 3, "b": 9})
    queue.add_first("x")
    queue.add_first("y")
    assert [*queue] == ["y", "x", "a", "b"]
    assert drain(queue) == "yxba"


def test_items_can_be_passed_over() -> None:
    queue = queue_of({"a": 3, "b": 9, "c": 5})
    assert queue.next({"b"}) == "c"
    assert queue.next({"b", "c"}) == "a"
    assert queue.next({"a", "b", "c"}) is None
    assert drain(queue) == "bca"
    # Without patience the oldest is next, and the longest of the others
    queue = queue_of({"a": 3, "b": 4, "c": 5}, patience=0)
    assert queue.next({"b"}) == "a"
    assert queue.next({"a"}) == "c"


def test_no_item_is_passed_over_where_the_first_comes_first() -> None:
    queue = queue_of({"a": None, "b": 9})
    assert queue.next({"b"}) == "a"
    assert queue.next({"a"}) is None
    assert drain(queue) == "ab"


def test_an_item_may_come_back() -> None:
    queue = queue_of({"a": 3, "b": 9})
    queue.take("b")
    queue.add("b", 2)
    assert drain(queue) == "ab"


def test_no_item_waits_for_ever() -> None:
    """Short items among long ones are taken after a bounded number of others."""
    rng = random.Random(0)
    for patience in (30, 80):
        queue: WaitingQueue[int] = WaitingQueue(patience)
        ahead: dict[int, int] = {}
        taken = longest = 0
        for item in range(3000):
            if rng.random() < 0.1 and len(queue):
                removed = rng.choice([*queue])
                queue.remove(removed)
                del ahead[removed]
            # The item waits for those that are there, and for at most `patience` others
            ahead[item] = taken + len(queue) + patience
            queue.add(item, rng.choice([1, 50, 60, 70]))
            while len(queue) > 20:
                one = queue.next()
                assert one is not None
                queue.take(one)
                longest = max(longest, taken - (ahead[one] - patience))
                assert taken <= ahead.pop(one)
                taken += 1
        assert longest > 0, "some are overtaken"


def test_removed_items_are_not_kept() -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    queue: WaitingQueue[Item] = WaitingQueue(1000)
    for _ in range(500):
        queue.add(Item(), 5)
        if len(queue) > 10:
            queue.remove(next(iter(queue)))
    assert Item.alive <= 2 * len(queue) + 1


def test_small_engines_admit_at_once() -> None:
    for slots in (1, 8, 63):
        policy = AdmissionPolicy.for_slots(slots)
        assert policy.admits(running=slots - 1, ready=1, held=0, is_urgent=False)


def test_many_slots_are_filled_several_at_a_time() -> None:
    policy = AdmissionPolicy.for_slots(256)

    def admits(running: int = 255, ready: int = 1, held: int = 0, is_urgent: bool = False) -> bool:
        return policy.admits(running=running, ready=ready, held=held, is_urgent=is_urgent)

    assert not admits()
    assert not admits(running=128)
    assert admits(running=127)
    assert not admits(ready=7)
    assert admits(ready=8)
    assert not admits(held=7)
    assert admits(held=8)
    assert admits(is_urgent=True)
