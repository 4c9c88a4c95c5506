"""The device-bound rate: fitted rates and an ideal schedule."""

from collections import Counter
from typing import Any

import pytest

from idefics2_engine.jobs.plan.device_rates import Rates, Work, bound_seconds, step_counts


def row(kernel: str, case: str, ms: float, **counts: Any) -> dict[str, Any]:
    return {"kernel": kernel, "case": case, "impl": "triton", "ms": ms, **counts}


def image_row(case: str, patches: int, squares: int) -> dict[str, Any]:
    """Return a row of 2 us a patch and 0.25 ns a square."""
    return row("image", case, 1e3 * (2e-6 * patches + 0.25e-9 * squares))


ROWS = [
    image_row("image-980-b8", 8 * 4900, 8 * 4900**2),
    image_row("image-378x504-b16", 16 * 27 * 36, 16 * (27 * 36) ** 2),
    row("prefill", "prefill-16384", 800.0, text_tokens=16384),
    row("prefill", "prefill-4096", 100.0, text_tokens=4096),
    row("step", "decode-b1", 4.0, batch=1),
    row("step", "decode-b32", 5.0, batch=32),
    row("step", "decode-b128", 8.0, batch=128),
]


def test_rates_are_fitted_to_rows() -> None:
    theirs = [{**one, "impl": "transformers", "ms": 1e6} for one in ROWS]
    wrong = {"kernel": "step", "case": "decode-b2", "impl": "triton", "batch": 2}
    quantized = [{**one, "case": f"{one['case']}-nf4", "ms": one["ms"] / 2} for one in ROWS]
    rates = Rates.from_rows([*theirs, wrong, *quantized, *ROWS], 14)
    assert rates.patch == pytest.approx(2e-6)
    assert rates.square == pytest.approx(0.25e-9)
    assert rates.token == pytest.approx(0.1 / 4096)
    assert rates.steps == {1: 0.004, 32: 0.005, 128: 0.008}
    assert Rates.from_rows([*ROWS, *quantized], 14, "nf4").patch == pytest.approx(1e-6)
    assert str(rates) == (
        "patches x 2.000 us + squares x 250.0 ps + prompt tokens x 24.41 us"
        " + decode steps by sequences (ms: 1: 4.00, 32: 5.00, 128: 8.00)"
    )


def test_one_kind_of_image_gives_patches_alone_a_rate() -> None:
    rates = Rates.from_rows(ROWS[1:], 14)
    patches = 16 * 27 * 36
    assert rates.patch == pytest.approx(ROWS[1]["ms"] / 1e3 / patches)
    assert rates.square == 0
    # Squares that would save time are left out
    odd = [row("image", "image-980-b1", 1.0), row("image", "image-140-b100", 10.0)]
    rates = Rates.from_rows([*odd, *ROWS[2:]], 14)
    assert rates.square == 0
    assert 0 < rates.patch < 1e-5


@pytest.mark.parametrize("kernel", ["image", "prefill", "step"])
def test_rates_need_a_row_of_each_kind(kernel: str) -> None:
    rows = [one for one in ROWS if one["kernel"] != kernel]
    with pytest.raises(ValueError, match=f"rates: must have a row of kernel '{kernel}', got none"):
        Rates.from_rows(rows, 14)


def test_steps_are_interpolated_and_extrapolated() -> None:
    rates = Rates.from_rows(ROWS, 14)
    seconds = [rates.step(batch) for batch in (1, 32, 80, 128, 256)]
    assert seconds == pytest.approx([0.004, 0.005, 0.0065, 0.008, 0.012])
    assert Rates(0, 0, 0, {32: 0.005}).step(100) == 0.005


def test_ideal_schedule_keeps_sequences_busy() -> None:
    # The first token of an answer is part of its prompt
    assert step_counts(Counter([5, 5, 3, 3]), 4) == {4: 2, 2: 2}
    # With two at once: 5 and 5, then 3 and 3
    assert step_counts(Counter([3, 5, 3, 5]), 2) == {2: 6}
    assert step_counts(Counter([9, 3, 3, 3]), 2) == {2: 6, 1: 2}
    assert step_counts(Counter([1, 1, 1]), 2) == {}
    counts = step_counts(Counter([16, 32, 64, 128, 256] * 50), 32)
    assert sum(batch * count for batch, count in counts.items()) == 50 * (16 + 32 + 64 + 128 + 251)
    assert max(counts) == 32


def test_bound_is_the_sum_of_useful_work() -> None:
    rates = Rates.from_rows(ROWS, 14)
    work = Work(Counter([1000, 2000]), 4096, answers=Counter([9, 9]), sequences=1)
    seconds = bound_seconds(work, rates)
    assert seconds["images"] == pytest.approx(3000 * 2e-6 + 5e6 * 0.25e-9)
    assert seconds["prompts"] == pytest.approx(0.1)
    assert seconds["decode"] == pytest.approx(16 * 0.004)
    # Without images there is nothing to pay for them
    assert bound_seconds(Work(Counter(), 0, Counter(), 1), rates) == {
        "images": 0,
        "prompts": 0,
        "decode": 0,
    }
