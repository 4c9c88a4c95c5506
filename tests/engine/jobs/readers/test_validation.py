"""The check before the model is loaded: all bad rows, repeated identifiers, columns without values."""

from pathlib import Path
from typing import Any

from idefics2_engine.jobs.readers.rows.row_ids import RepeatedId
from idefics2_engine.jobs.readers.validation import validate
from job_inputs import job_input, write_rows


def test_all_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": str(number)} for number in range(100)]
    for number in range(0, 100, 3):
        rows[number] = b"{"
    for number in range(1, 100, 9):
        rows[number] = {"prompt": "a", "sampling": {"n": 0}}
    rows[98] = {"id": "x"}
    path = write_rows(tmp_path / "q.jsonl", rows)
    seen: list[int] = []
    found = validate(job_input(path), on_row=lambda row: seen.append(row.index))
    assert seen == list(range(100))
    assert (found.num_rows, found.num_bad) == (100, 34 + 11 + 1)
    assert list(found.counts.items()) == [("json", 34), ("sampling", 11), ("schema", 1)]
    assert len(found.bad_rows) == 20
    assert [row.number for row in found.bad_rows[:4]] == [0, 1, 3, 6]
    assert found.bad_rows[1].place == f"{path}: line 2"
    assert (found.num_repeated, found.repeated, found.empty_columns) == (0, (), ())


def test_good_inputs_have_nothing_wrong(tmp_path: Path) -> None:
    found = validate(job_input(write_rows(tmp_path / "q.jsonl", [{"prompt": "a"}] * 3)))
    assert found == (3, 0, {}, (), 0, (), ())
    assert validate(job_input(write_rows(tmp_path / "q.jsonl", []))).num_rows == 0


def test_repeated_identifiers_have_both_places_over_all_files(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [{"id": "x", "prompt": "a"}, {"prompt": "b"}])
    two = write_rows(tmp_path / "b.jsonl", [b"", {"id": "row-1", "prompt": "c"}, {"id": "x"}])
    found = validate(job_input(tmp_path))
    assert found.num_repeated == 2
    assert found.repeated == (
        RepeatedId("row-1", f"{one}: line 2", f"{two}: line 2"),
        RepeatedId("x", f"{one}: line 1", f"{two}: line 3"),
    )
    assert found.counts == {"schema": 1}
    found = validate(job_input(tmp_path, on_duplicate_id="suffix"))
    assert (found.num_repeated, found.repeated) == (0, ())


def test_identifiers_of_other_shards_count_and_their_errors_do_not(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}, {"id": "y"}, {"id": "z"}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    for part in (0, 1):
        found = validate(job_input(path, shard=f"{part}/2"))
        assert (found.num_rows, found.num_bad) == (2, 1)
        assert found.repeated == (RepeatedId("x", f"{path}: line 1", f"{path}: line 2"),)
    # Rows outside the job are none of its rows
    assert validate(job_input(path, limit=1)).num_repeated == 0


def test_columns_that_no_row_has_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "one": None, "two": 0}, {"prompt": "b"}, {"three": 1}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    found = validate(job_input(path, keep=["three", "two", "one"]))
    assert found.empty_columns == ("three", "one")
