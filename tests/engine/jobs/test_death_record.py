"""The record of rows that were in flight at deaths, and the room in which a row runs alone."""

import asyncio
from pathlib import Path

from idefics2_engine.jobs.death_record import DeathRecord, Verdict
from idefics2_engine.jobs.row_room import RowRoom


def test_a_row_at_two_deaths_runs_alone_and_is_lost_at_the_third(tmp_path: Path) -> None:
    path = tmp_path / "deaths.jsonl"
    verdicts = []
    for _ in range(4):
        # A process that dies does not close its record
        record = DeathRecord(path)
        verdicts.append(record.verdict("killer"))
        record.begin("answered")
        record.end("answered")
        record.begin("killer", alone=verdicts[-1] is Verdict.ALONE)
    assert verdicts == [Verdict.TOGETHER, Verdict.TOGETHER, Verdict.ALONE, Verdict.LOST]
    assert DeathRecord(path).verdict("answered") is Verdict.TOGETHER


def test_a_row_that_survives_alone_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "deaths.jsonl"
    for _ in range(2):
        DeathRecord(path).begin("suspect")
    record = DeathRecord(path)
    assert record.verdict("suspect") is Verdict.ALONE
    record.begin("suspect", alone=True)
    record.end("suspect", alone=True)
    assert record.verdict("suspect") is Verdict.TOGETHER
    assert DeathRecord(path).verdict("suspect") is Verdict.TOGETHER


def test_one_of_two_equal_rows_is_still_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "deaths.jsonl"
    for _ in range(2):
        record = DeathRecord(path)
        record.begin("twice")
        record.begin("twice")
        record.end("twice")
    assert DeathRecord(path).verdict("twice") is Verdict.ALONE


def test_a_line_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "deaths.jsonl"
    DeathRecord(path).begin("row")
    with path.open("ab") as file:
        file.write(b'["end", "ro')
    DeathRecord(path).begin("row")
    assert DeathRecord(path).verdict("row") is Verdict.ALONE


def test_a_record_is_removed_at_the_end(tmp_path: Path) -> None:
    record = DeathRecord(tmp_path / "deaths.jsonl")
    record.begin("row")
    assert list(tmp_path.iterdir())
    record.close()
    record.close()
    record.end("row")
    assert not list(tmp_path.iterdir())


def test_a_row_alone_waits_for_others_and_others_wait_for_it() -> None:
    async def run() -> list[str]:
        room = RowRoom()
        events = []
        may_leave = asyncio.Event()

        async def together(name: str) -> None:
            async with room.together():
                events.append(f"{name} enters")
                await may_leave.wait()
                events.append(f"{name} leaves")

        async def alone(name: str) -> None:
            async with room.alone():
                events.append(f"{name} enters")
                # Others may run, and must not enter
                for _ in range(10):
                    await asyncio.sleep(0)
                events.append(f"{name} leaves")

        tasks = [asyncio.create_task(together("first"))]
        await asyncio.sleep(0)
        for function, name in ((alone, "suspect"), (alone, "other"), (together, "last")):
            tasks.append(asyncio.create_task(function(name)))
            await asyncio.sleep(0)
        canceled = asyncio.create_task(alone("canceled"))
        await asyncio.sleep(0)
        canceled.cancel()
        may_leave.set()
        await asyncio.gather(*tasks)
        return events

    assert asyncio.run(run()) == [
        f"{name} {what}"
        for name in ("first", "suspect", "other", "last")
        for what in ("enters", "leaves")
    ]
