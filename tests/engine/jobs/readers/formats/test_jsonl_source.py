"""JSONL files: lines, their limits, packed files, and the form that the first row shows."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.readers.formats.jsonl_source import JsonlSource
from idefics2_engine.jobs.readers.source import RawRow
from job_inputs import write_rows

LIMIT = 1 << 20


def read(content: bytes, folder: Path, limit: int = LIMIT) -> list[RawRow]:
    path = folder / "q.jsonl"
    path.write_bytes(content)
    return list(JsonlSource(str(path), "plain", limit))


def lines_of(rows: list[RawRow]) -> list[int]:
    return [int(row.place.rpartition(" ")[2]) for row in rows]


def codes(rows: list[RawRow]) -> list[str | None]:
    return [None if row.error is None else row.error.code for row in rows]


def test_byte_order_mark_line_ends_and_blank_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\r\n{"a": 2}\n\r\n{"a": 3}'
    rows = read(content, tmp_path)
    assert [row.columns for row in rows] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [row.place for row in rows] == [f"{tmp_path}/q.jsonl: line {n}" for n in (1, 4, 6)]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    # Other characters end lines for str.splitlines
    value = {"a": "x\u2028y\u2029z\x85\x0b\x0c"}
    text = json.dumps(value, ensure_ascii=False).replace("\\u000b", "").replace("\\f", "")
    rows = read(f'{text}\n{{"a": "1\r2"}}\n{{"a": 3}}\n'.encode(), tmp_path)
    assert rows[0].columns == {"a": "x\u2028y\u2029z\x85"}
    assert codes(rows) == [None, "json", None]
    assert lines_of(rows) == [1, 2, 3]


def test_a_file_without_rows_has_none(tmp_path: Path) -> None:
    for content in (b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        assert read(content, tmp_path) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([b'{"a": 1}', b"{", b"", b" ", b"[1]", b"\xff", b"\xef\xbb\xbf", b"x" * 50])
        | st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
        max_size=12,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)
def test_every_line_with_content_is_a_row(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, is_ended: bool
) -> None:
    content = end.join(lines) + (end if is_ended else b"")
    rows = read(content, tmp_path_factory.getbasetemp(), limit=40)
    first = content.removeprefix(b"\xef\xbb\xbf")
    wanted = [
        number
        for number, line in enumerate(first.split(b"\n"), 1)
        if line and not (line + b"\n").isspace()
    ]
    assert lines_of(rows) == wanted
    assert all((row.columns is None) != (row.error is None) for row in rows)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_lines_of_the_limit_are_read_and_longer_ones_are_bad(
    tmp_path: Path, mark: bytes, end: bytes
) -> None:
    line = b'{"a": "' + b"x" * 91 + b'"}'
    assert len(line) == 100
    for limit, wanted in ((100, None), (99, "json"), (10, "json")):
        rows = read(mark + line + end, tmp_path, limit)
        assert codes(rows) == [wanted]
    assert rows[0].error is not None
    assert rows[0].error.message == "line must have at most 10 bytes, got 100"


def test_a_line_of_100_mb_costs_no_memory_and_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"a": 2}\n')
    source = JsonlSource(str(path), "plain", LIMIT)
    tracemalloc.start()
    try:
        rows = list(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row.columns for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert rows[1].error is not None
    assert rows[1].error.message == f"line must have at most {LIMIT} bytes, got 100000009"
    assert peak < 8 * LIMIT


def packed(data: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(data)
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return packed


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_packed_files_are_unpacked(tmp_path: Path, kind: str) -> None:
    rows = [{"a": number, "b": "x" * (number % 97)} for number in range(5000)]
    plain = write_rows(tmp_path / "q.jsonl", rows).read_bytes()
    path = tmp_path / f"q.jsonl{kind}"
    # Files that were packed one by one may be joined
    path.write_bytes(packed(plain[:70_000], kind) + packed(plain[70_000:], kind))
    source = JsonlSource(str(path), None, LIMIT)
    assert [row.columns for row in source] == rows
    assert [row.columns for row in source] == rows
    path.write_bytes(packed(b"", kind))
    assert list(source) == []


@pytest.mark.parametrize("kind", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "followed"])
def test_damaged_packed_files_are_errors(tmp_path: Path, kind: str, damage: str) -> None:
    plain = b"".join(b'{"a": %d}\n' % number for number in range(10_000))
    data = packed(plain, kind)
    path = tmp_path / f"q.jsonl{kind}"
    half = len(data) // 2
    damaged = {
        "cut": data[:half],
        "flipped": data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :],
        "followed": data + b"rubbish",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(JobError, match="cannot be unpacked: its compressed data are damaged"):
        list(JsonlSource(str(path), "plain", LIMIT))


def test_files_that_cannot_be_opened_are_errors(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read: No such file or directory"):
        JsonlSource(str(tmp_path / "no.jsonl"), None, LIMIT)
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        ("/dev/zero", "a pipe"),
    ):
        with pytest.raises(JobError, match=f"must be a file that can be read twice, got {kind}"):
            JsonlSource(str(name), None, LIMIT)


OPENAI: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}


@pytest.mark.parametrize(
    ("first", "form"),
    [
        ([OPENAI], "openai"),
        ([{"custom_id": "a", "body": {}}], "openai"),
        ([{"prompt": "x"}], "plain"),
        ([{"body": "x"}], "plain"),
        ([{"custom_id": "x"}], "plain"),
        ([b"", b"{", b"[]", b"\xff", OPENAI], "openai"),
        ([b"{", {"prompt": "x"}, OPENAI], "plain"),
        ([b"{"], "plain"),
        ([], "plain"),
    ],
)
def test_first_good_row_shows_the_form(tmp_path: Path, first: list[Any], form: str) -> None:
    path = write_rows(tmp_path / "q.jsonl", first)
    assert JsonlSource(str(path), None, LIMIT).form == form
