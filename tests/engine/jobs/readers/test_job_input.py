"""Inputs of jobs: the same rows every time, lazily, in parts, and keys that notice every change."""

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.formats import jsonl_source
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.json_line import parse_line
from idefics2_engine.sampling_params import SamplingParams
from job_inputs import (
    DEFAULTS,
    comparable,
    error_of,
    input_options,
    job_input,
    read_rows,
    text_of,
    write_rows,
)

GOOD: dict[str, Any] = {"id": "a", "images": ["a.png"], "prompt": "Why?", "sampling": {"seed": 1}}
BAD = [
    b"{", b'{"prompt": NaN}', b"\xff", b'{"a": 1, "a": 2}', b"[]", b'{"id": [], "prompt": "a"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "sampling": {"n": 0}}', b'{"prompt": "a", "x": 1}',
    b'{"messages": [{}]}', b"[" * 10_000, b'{"prompt": "a\rb"}',
]  # fmt: skip
ROWS = st.lists(
    st.sampled_from([GOOD, {"prompt": "b"}, {"prompt": "c", "id": "a"}, {"prompt": "d", "id": 3}])
    | st.sampled_from(BAD),
    max_size=12,
)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_costs_no_other_row_anything(tmp_path: Path, bad: bytes) -> None:
    rows: list[Any] = [{"id": number, "prompt": f"q{number}"} for number in range(20)]
    good = read_rows(write_rows(tmp_path / "q.jsonl", rows))
    found = read_rows(write_rows(tmp_path / "q.jsonl", [*rows[:10], bad, *rows[10:]]))
    error = error_of(found.pop(10))
    assert len(error.message) <= 500
    assert str(tmp_path) not in error.message
    assert [(row.id, row.key, row.prompt) for row in found] == [
        (row.id, row.key, row.prompt) for row in good
    ]
    assert [row.number for row in found] == [*range(10), *range(11, 21)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=3),
    st.none() | st.integers(1, 30),
    st.none() | st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from(["error", "suffix"]),
)
def test_shards_together_are_the_whole_job(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[Any]],
    sample: int | None,
    limit: int | None,
    num_parts: int,
    on_duplicate_id: str,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for number, rows in enumerate(files):
        write_rows(folder / f"{number}.jsonl", rows)
    options = {"sample": sample, "limit": limit, "on_duplicate_id": on_duplicate_id}
    options |= {"input_format": "jsonl", "sample_seed": 5}
    whole = job_input(folder, **options)
    rows = [comparable(row) for row in whole.rows()]
    assert [comparable(row) for row in whole.rows()] == rows
    assert [comparable(row) for row in job_input(folder, **options).rows()] == rows
    num_rows = sum(map(len, files))
    assert len(rows) == min(num_rows, sample or num_rows, limit or num_rows)
    assert [row[0] for row in rows] == list(range(len(rows)))
    begin = len(rows) // 2
    assert [comparable(row) for row in whole.rows(begin=begin)] == rows[begin:]
    assert not list(whole.rows(begin=len(rows)))
    numbers = [row[1] for row in rows]
    assert numbers == sorted(set(numbers))
    if sample is None:
        assert numbers == list(range(len(rows)))
    if on_duplicate_id == "suffix":
        assert len({row[2] for row in rows}) == len(rows)
    parts = []
    for part in range(num_parts):
        found = list(job_input(folder, **options, shard=f"{part}/{num_parts}").rows())
        assert [row.index for row in found] == list(range(len(found)))
        other = job_input(folder, **options, shard=f"{part}/{num_parts}").rows(begin=1)
        assert [comparable(row) for row in other] == [comparable(row) for row in found[1:]]
        # The place in the whole job follows from the place in the shard
        parts += [(row.index * num_parts + part, *comparable(row)[1:]) for row in found]
    assert sorted(parts, key=lambda row: int(row[0])) == rows


def test_several_iterators_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"id": "a", "prompt": str(n)} for n in range(6)])
    found = job_input(path, on_duplicate_id="suffix")
    pairs = list(zip(found.rows(), found.rows(), strict=True))
    assert all(comparable(one) == comparable(two) for one, two in pairs)
    assert [one.id for one, _ in pairs] == ["a", "a-2", "a-3", "a-4", "a-5", "a-6"]


def test_rows_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": str(number)} for number in range(100)])
    found = job_input(path)
    parsed = []

    def count(line: bytes) -> dict[str, Any]:
        parsed.append(line)
        return parse_line(line)

    monkeypatch.setattr(jsonl_source, "parse_line", count)
    rows = found.rows()
    assert not parsed
    for number in range(1, 4):
        next(rows)
        assert len(parsed) == number
    parsed.clear()
    assert len(list(job_input(path, limit=5, input_format="jsonl").rows())) == 5
    assert len(parsed) == 5
    parsed.clear()
    assert [text_of(row) for row in found.rows(begin=97)] == ["97", "98", "99"]
    assert len(parsed) == 3


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_rows(path, ({"prompt": "x" * 4000, "id": number} for number in range(800)))
    for options in ({}, {"sample": 10}, {"on_duplicate_id": "suffix"}):
        found = job_input(path, **options)
        for _ in found.rows():
            pass
        tracemalloc.start()
        try:
            for _ in found.rows():
                pass
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The file has 3 MB
        assert peak < 1_000_000


def test_identifiers_of_rows_without_one_are_their_place_in_the_input(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "1"}, b"{", {"id": "x", "prompt": "2"}])
    write_rows(tmp_path / "b.jsonl", [b"", {"prompt": "3"}])
    rows = read_rows(tmp_path)
    assert [row.id for row in rows] == ["row-0", "row-1", "x", "row-3"]
    lines = [("a", 1), ("a", 2), ("a", 3), ("b", 2)]
    assert [row.place for row in rows] == [f"{tmp_path}/{n}.jsonl: line {i}" for n, i in lines]
    # They are those of the whole input in any part of it
    assert [row.id for row in read_rows(tmp_path, shard="1/2")] == ["row-1", "row-3"]


def key_of(folder: Path, row: object, **options: Any) -> str:
    (found,) = read_rows(write_rows(folder / "q.jsonl", [row]), **options)
    return found.key


def test_keys_depend_on_everything_that_the_answer_depends_on(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "b.png").write_bytes(b"1")
    row = GOOD | {"title": "t"}
    keep = {"keep": ["title"]}
    changes: list[Any] = [
        row | {"id": "b"},
        row | {"id": 1},
        row | {"id": "1"},
        row | {"images": ["b.png"]},
        row | {"images": []},
        row | {"images": ["a.png", "a.png"]},
        row | {"images": ["no.png"]},
        row | {"images": ["data:,a"]},
        row | {"images": ["https://a/b"]},
        row | {"prompt": "Why"},
        row | {"sampling": {"seed": 2}},
        row | {"sampling": {}},
        row | {"title": "u"},
        row | {"prompt": 7},
        row | {"prompt": 8.5},
        {"id": "a", "messages": [{"role": "user", "content": "Why?"}]},
        {"id": "a", "messages": [{"role": "system", "content": "Why?"}]},
        b"{",
    ]
    keys = [key_of(tmp_path, one, **keep) for one in (row, *changes)]
    assert len(set(keys)) == len(keys)
    # The order of keys and spaces are no part of a row
    assert (
        key_of(tmp_path, json.dumps(dict(reversed(row.items())), indent=None).encode(), **keep)
        == keys[0]
    )
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert key_of(tmp_path, row, **keep) != keys[0]


def test_keys_hash_content_if_asked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    before = key_of(tmp_path, GOOD, hash_media=True)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert key_of(tmp_path, GOOD, hash_media=True) == before
    (tmp_path / "a.png").write_bytes(b"2")
    assert key_of(tmp_path, GOOD, hash_media=True) != before


def test_keys_do_not_depend_on_where_the_files_are(tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.png").write_bytes(b"1")
        os.utime(folder / "a.png", ns=(1, 1))
        keys.add(key_of(folder, GOOD))
        keys.add(key_of(tmp_path, GOOD | {"images": [f"{folder}/a.png"]}, media_root=folder))
    assert len(keys) == 1


def test_keys_do_not_depend_on_defaults_of_the_job(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [GOOD])
    options = input_options(str(path))
    first, second = (
        next(JobInput(options, params).rows()) for params in (DEFAULTS, SamplingParams(n=2))
    )
    assert first.key == second.key
    assert first.sampling_params == SamplingParams(temperature=0.0, max_tokens=7, seed=1)
    assert second.sampling_params == SamplingParams(n=2, seed=1)


def test_media_root_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "q.jsonl", [{"prompt": name}])
    monkeypatch.chdir(tmp_path)
    found = job_input("one/q.jsonl")
    assert (found.media_root, found.files) == (tmp_path / "one", (Path("one/q.jsonl"),))
    assert job_input("one").media_root == tmp_path / "one"
    with pytest.raises(ConfigError, match="media_root must be given, because the inputs are in 2"):
        job_input("two", "one")
    found = job_input("two", "one", media_root=".")
    assert found.files == (Path("one/q.jsonl"), Path("two/q.jsonl"))
    assert [text_of(row) for row in found.rows()] == ["one", "two"]


def test_a_prompt_of_the_job_does_not_fit_openai_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"custom_id": "a", "body": {}}])
    with pytest.raises(ConfigError, match="prompt must be in the rows of OpenAI lines"):
        job_input(path, prompt="Why?")


def test_fingerprint_parts_have_what_rows_depend_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"title": "a"}])
    file = tmp_path / "prompt.txt"
    file.write_text("{title}\n")
    parts = job_input(path, prompt="{title}").fingerprint_parts()
    assert job_input(path, prompt_template=file).fingerprint_parts() == parts
    others: list[dict[str, Any]] = [
        {"prompt": "{title}?"}, {"keep": ["title"]}, {"limit": 1}, {"sample": 1}, {"shard": "0/2"},
        {"on_duplicate_id": "suffix"}, {"hash_media": True}, {"id_column": "title"}, {"check_model": "m"},
    ]  # fmt: skip
    found = [job_input(path, **({"prompt": "{title}"} | one)).fingerprint_parts() for one in others]
    texts = {json.dumps(one) for one in (parts, *found)}
    assert len(texts) == len(others) + 1


def test_a_long_job_is_in_order(tmp_path: Path) -> None:
    numbers = random.Random(0).sample(range(10**6), 2000)
    path = write_rows(tmp_path / "q.jsonl", ({"id": one, "prompt": str(one)} for one in numbers))
    rows = read_rows(path)
    assert [row.id for row in rows] == numbers
    sampled = read_rows(path, sample=50)
    assert [row.id for row in sampled] == [numbers[row.number] for row in sampled]
    assert [row.id for row in read_rows(path, sample=50, limit=7)] == [
        row.id for row in sampled[:7]
    ]
