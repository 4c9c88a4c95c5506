"""The chosen policy, in the simulation by which its numbers were chosen."""

from dataclasses import replace

import pytest

from idefics2_engine.scheduling.admission import AT_ONCE, AdmissionPolicy
from simulate_admission import Costs, Job, offline_jobs, simulate

CHOSEN = AdmissionPolicy.for_slots(256)


def test_a_step_costs_what_it_computes() -> None:
    costs = Costs(step=100.0, sequence=10.0, token=1.0, patch=0.1, mixed=5.0)
    found = simulate([Job(tokens=7, patches=20, new_tokens=3)] * 2, AT_ONCE, costs)
    assert (found.steps, found.mixed_steps) == (3, 1)
    assert found.seconds == pytest.approx((3 * 120 + 5 + 2 * 9) / 1000)


@pytest.mark.parametrize("costs", [Costs(), Costs(mixed=5.0), Costs(interval=1000 / 70)], ids=str)
def test_the_policy_takes_less_time_than_admission_at_once(costs: Costs) -> None:
    for seed in range(2):
        jobs = offline_jobs(1024, seed)
        chosen, at_once = (simulate(jobs, policy, costs) for policy in (CHOSEN, AT_ONCE))
        assert chosen.seconds < at_once.seconds
        assert chosen.mixed_steps < 0.5 * at_once.mixed_steps


def test_a_few_requests_are_admitted_as_they_come() -> None:
    jobs = offline_jobs(120, 0)
    costs = Costs(interval=30.0)
    at_once = replace(AT_ONCE, patience=CHOSEN.patience)
    assert simulate(jobs, CHOSEN, costs) == simulate(jobs, at_once, costs)
