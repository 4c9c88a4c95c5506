"""Simulate a job of the offline workload with other numbers of the admission policy.

    PYTHONPATH=engine:kernels:bench python tests/tools/simulate_admission.py

A step is a sum of what it computes, at the rates of an H200: no device and no clock is needed. The
program prints a line for each policy: requests a second, steps, and steps that compute prompts.
``docs/design/runtime.md`` has the findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from idefics2_bench.offline_workloads import NEW_TOKENS, TEXT_TOKENS
from idefics2_engine.images.tiling import resized_size
from idefics2_engine.jobs.plan.latency_case import SIZES
from idefics2_engine.scheduling.admission import AT_ONCE, AdmissionPolicy
from idefics2_engine.scheduling.waiting_queue import WaitingQueue

_LONGEST_EDGE, _SHORTEST_EDGE, _PATCH = 980, 378, 14
# Tokens of an image with the token before it, and the tokens around all images
_IMAGE_TOKENS, _AROUND = 65, 2


@dataclass(frozen=True)
class Job:
    """A request's prompt tokens, patches and new tokens."""

    tokens: int
    patches: int
    new_tokens: int


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts of a step.

    Attributes:
        step: A step without sequences.
        sequence: A sequence that gets a token.
        token: A prompt token.
        patch: A patch.
        mixed: A step that computes prompts, besides what it computes.
        interval: Time to prepare a request.
    """

    step: float = 4.2
    sequence: float = 0.016
    token: float = 0.0238
    patch: float = 0.00325
    mixed: float = 0.5
    interval: float = 0.0


_RATES = Costs()


@dataclass(frozen=True)
class Outcome:
    """What a simulated job took."""

    seconds: float
    steps: int
    mixed_steps: int


def offline_jobs(count: int, seed: int, *, images: bool = True) -> list[Job]:
    """Draw requests with the sizes and lengths of ``workloads.offline_requests``."""
    random = np.random.default_rng(seed)
    jobs = []
    for index in range(count):
        num_images = 2 if index % 8 == 7 else 1
        sizes = [SIZES[i] for i in random.integers(0, len(SIZES), num_images)]
        text = int(random.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
        resized = [resized_size(w, h, _LONGEST_EDGE, _SHORTEST_EDGE) for h, w in sizes]
        patches = sum((a // _PATCH) * (b // _PATCH) for a, b in resized)
        tokens = text + _AROUND + _IMAGE_TOKENS * num_images
        jobs.append(Job(tokens, patches if images else 0, int(random.choice(NEW_TOKENS))))
    return jobs


def simulate(
    jobs: Sequence[Job],
    policy: AdmissionPolicy,
    costs: Costs = _RATES,
    *,
    slots: int = 256,
    in_flight: int = 512,
    max_tokens: int = 8192,
    max_patches: int = 39_200,
) -> Outcome:
    """Run ``jobs`` as ``LLM.iterate`` does, without pages: every prompt is computed in one step."""
    queue: WaitingQueue[int] = WaitingQueue(policy.patience)
    # Jobs that are prepared, with their times, and new tokens that running jobs still need
    prepared: list[tuple[float, int]] = []
    left: list[int] = []
    now = last_prepared = 0.0
    begun = ended = steps = mixed_steps = held = 0
    while ended < len(jobs):
        while begun < len(jobs) and begun - ended < in_flight:
            last_prepared = max(last_prepared, now) + costs.interval
            prepared.append((last_prepared, begun))
            begun += 1
        while prepared and prepared[0][0] <= now:
            _, index = prepared.pop(0)
            queue.add(index, jobs[index].new_tokens)
        if not left and not len(queue):
            now = prepared[0][0]
            continue
        ready = min(len(queue), slots - len(left))
        joined: list[Job] = []
        if ready and policy.admits(running=len(left), ready=ready, held=held, is_urgent=False):
            tokens, patches = max_tokens - len(left), max_patches
            while len(joined) < ready:
                first = queue.next()
                assert first is not None
                job = jobs[first]
                if job.tokens > tokens or job.patches > patches < max_patches:
                    break
                tokens, patches = tokens - job.tokens, patches - job.patches
                queue.take(first)
                joined.append(job)
            held = 0
        else:
            held = held + 1 if ready else 0
        left += [job.new_tokens for job in joined]
        now += costs.step + costs.sequence * len(left) + costs.mixed * bool(joined)
        now += sum(costs.token * job.tokens + costs.patch * job.patches for job in joined)
        steps, mixed_steps = steps + 1, mixed_steps + bool(joined)
        ended += left.count(1)
        left = [count - 1 for count in left if count > 1]
    return Outcome(now / 1000, steps, mixed_steps)


def main() -> None:
    """Print the outcomes of several policies at several costs, each a mean of three jobs."""
    chosen = AdmissionPolicy.for_slots(256)
    policies = {"at once": AT_ONCE, "chosen": chosen}
    for enough, max_held in ((1, 0), (4, 8), (16, 16), (32, 32)):
        policies[f"{enough} or {max_held} steps"] = replace(
            chosen, enough=enough, max_held=max_held
        )
    for patience in (0, 128, 256, 10**9):
        policies[f"patience {patience}"] = replace(chosen, patience=patience)
    kinds = {
        "device's rates": Costs(),
        "5 ms more for a step with prompts": Costs(mixed=5.0),
        "70 requests/s are prepared": Costs(interval=1000 / 70),
    }
    for kind, costs in kinds.items():
        print(kind)
        for name, policy in policies.items():
            found = [simulate(offline_jobs(1024, seed), policy, costs) for seed in range(3)]
            rate = np.mean([1024 / outcome.seconds for outcome in found])
            steps = np.mean([outcome.steps for outcome in found])
            mixed = np.mean([outcome.mixed_steps for outcome in found])
            print(
                f"  {name:20} {rate:6.1f} requests/s, {steps:4.0f} steps, {mixed:4.0f} with prompts"
            )


if __name__ == "__main__":
    main()
