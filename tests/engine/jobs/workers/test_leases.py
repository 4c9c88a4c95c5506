"""Leases: workers share the rows, and a row that ends its worker costs no other row."""

import random

from idefics2_engine.jobs.workers.death_count import DeathCount
from idefics2_engine.jobs.workers.leases import LeasedRow, Leases


def leases(rows: int, workers: int = 2, most: int = 8) -> Leases:
    made = Leases(workers, most)
    for number in range(rows):
        made.add(LeasedRow(number, b"x" * number))
    return made


def taken(made: Leases, worker: int) -> list[int]:
    return [number for number, _ in made.take(worker)]


def test_last_rows_are_shared() -> None:
    made = leases(6)
    assert taken(made, 0) == [0, 1, 2]
    assert taken(made, 1) == [3, 4]
    assert taken(made, 0) == [5]
    assert taken(made, 1) == []


def test_worker_gets_rows_in_batches_until_its_lease_is_full() -> None:
    made = leases(99)
    assert taken(made, 0) == list(range(8))
    assert taken(made, 0) == []
    # One row is no batch while seven others run
    assert made.finish(0, 3) == 3
    assert taken(made, 0) == []
    assert made.finish(0, 0) == 0
    assert taken(made, 0) == [8, 9]


def test_worker_with_few_rows_gets_a_single_one() -> None:
    made = leases(1)
    assert taken(made, 0) == [0]
    made.add(LeasedRow(1, b""))
    assert taken(made, 0) == [1]


def test_lease_of_one_row() -> None:
    made = leases(3, most=1)
    assert (taken(made, 0), taken(made, 0), taken(made, 1)) == ([0], [], [1])


def test_rows_of_a_dead_worker_wait_in_front() -> None:
    made = leases(9)
    assert taken(made, 0) == [0, 1, 2, 3, 4]
    made.finish(0, 1)
    assert made.end_worker(0) == []
    assert taken(made, 1) == [0, 2, 3, 4]
    assert len(made) == 8


def test_row_of_two_deaths_runs_alone_and_is_lost_at_the_third() -> None:
    made = leases(4, workers=1)
    assert taken(made, 0) == [0, 1, 2, 3]
    made.end_worker(0)
    assert taken(made, 0) == [0, 1, 2, 3]
    made.finish(0, 0)
    made.end_worker(0)
    made.add(LeasedRow(4, b""))
    assert taken(made, 0) == [1]
    # No other row joins it
    assert taken(made, 0) == []
    made.finish(0, 1)
    assert taken(made, 0) == [2]
    assert made.end_worker(0) == [LeasedRow(2, b"xx")]
    assert taken(made, 0) == [3]
    made.finish(0, 3)
    assert taken(made, 0) == [4]
    made.finish(0, 4)
    assert len(made) == 0
    # A new row of the same number has no past
    made.add(LeasedRow(2, b""))
    assert taken(made, 0) == [2]
    assert made.end_worker(0) == []


def test_worker_that_has_rows_gets_no_suspect() -> None:
    made = leases(12, most=4)
    assert taken(made, 0) == [0, 1, 2, 3]
    made.end_worker(0)
    assert taken(made, 0) == [0, 1, 2, 3]
    assert taken(made, 1) == [4, 5, 6, 7]
    made.end_worker(0)
    made.finish(1, 4)
    assert taken(made, 1) == [8]
    assert taken(made, 0) == [0]


def test_every_row_ends_once_and_only_poison_is_lost() -> None:
    """Workers end whenever they have read a poison row, and sometimes without a reason."""
    for seed in range(40):
        rng = random.Random(seed)
        workers, rows = rng.randint(1, 4), rng.randint(1, 60)
        poison = set(rng.sample(range(rows), rng.randint(0, min(3, rows))))
        made = leases(rows, workers, rng.randint(1, 9))
        has: list[list[int]] = [[] for _ in range(workers)]
        ends: list[int] = []
        while made:
            worker = rng.randrange(workers)
            has[worker] += taken(made, worker)
            if not has[worker]:
                continue
            number = has[worker].pop(0)
            if number not in poison:
                made.finish(worker, number)
                ends.append(number)
                continue
            has[worker] = []
            lost = [row.number for row in made.end_worker(worker)]
            assert set(lost) <= poison
            ends += lost
        assert sorted(ends) == list(range(rows))


def test_job_is_hopeless_when_all_workers_died_three_times_without_an_answer() -> None:
    deaths = DeathCount(2)
    for worker in (0, 0, 0, 0, 1, 1):
        deaths.died(worker, was_ready=True)
        assert not deaths.is_hopeless
    deaths.died(1, was_ready=True)
    assert deaths.is_hopeless
    deaths.row_answered()
    assert not deaths.is_hopeless
    assert deaths.total == 7


def test_lost_rows_explain_deaths_up_to_eight_without_an_answer() -> None:
    deaths = DeathCount(1)
    for _ in range(7):
        for _ in range(2):
            deaths.died(0, was_ready=True)
            assert not deaths.is_hopeless
        deaths.died(0, was_ready=True)
        deaths.row_lost()
        assert not deaths.is_hopeless
    deaths.row_lost()
    assert deaths.is_hopeless
    deaths.row_answered()
    assert not deaths.is_hopeless


def test_worker_whose_engine_is_never_built_is_given_up() -> None:
    deaths = DeathCount(2)
    for was_ready in (False, False, True, False, False):
        deaths.died(0, was_ready=was_ready)
        deaths.row_answered()
        assert not deaths.is_given_up(0)
    deaths.died(0, was_ready=False)
    assert deaths.is_given_up(0)
    assert not deaths.is_given_up(1)
    # From now on the other one alone decides
    deaths.row_answered()
    for _ in range(2):
        deaths.died(1, was_ready=True)
        assert not deaths.is_hopeless
    deaths.died(1, was_ready=True)
    assert deaths.is_hopeless
