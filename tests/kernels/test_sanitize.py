"""The parts of racecheck's report that ``make sanitize`` uses."""

from sanitize import hazards

HANDED_OUT = "handed out: _kernel 100000 100008"


def report(address: int, kernel: str = "_kernel", listed: int = 1, errors: int = 1) -> list[str]:
    return [
        HANDED_OUT,
        f"========= Error: Potential RAW hazard detected at __shared__ {address:#x} in block (4,0,0) :",
        f"=========     Write Thread (31,0,0) at {kernel}+0xb340 in kernel.py:99",
        f"=========     Read Thread (288,0,0) at {kernel}+0x210 in kernel.py:99",
        f"========= RACECHECK SUMMARY: {listed} hazards displayed ({errors} errors, 0 warnings)",
    ]


def test_hazards_in_handed_out_bytes_are_ignored() -> None:
    assert not hazards(report(100000))
    assert not hazards(report(100007))
    assert not hazards(["========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"])


def test_other_hazards_are_reported() -> None:
    assert len(hazards(report(100008))) == 1
    assert len(hazards(report(99999))) == 1
    assert len(hazards(report(100000, "_other"))) == 1
    assert len(hazards(report(100000)[1:])) == 1
    assert len(hazards(report(100000, listed=2, errors=2))) == 1
    assert len(hazards(report(100000, errors=2))) == 1
    assert len(hazards(report(100000)[:-1])) == 1
