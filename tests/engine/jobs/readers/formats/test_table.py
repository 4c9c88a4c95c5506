"""Parquet and CSV: every value that is plain data is read, and damage costs as little as it can."""

import csv
import datetime
import gzip
import io
import os
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.readers.formats import table
from idefics2_engine.jobs.readers.formats.arrow_values import UnreadableValue
from idefics2_engine.jobs.readers.formats.table import CsvSource, ParquetSource
from idefics2_engine.jobs.readers.source import UNREAD, RawRow

ALL = SimpleNamespace(columns_needed=None)
PICTURE = {"bytes": b"\x89PNG", "path": None}


def needs(*columns: str) -> SimpleNamespace:
    return SimpleNamespace(columns_needed=columns)


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def parquet_rows(path: Path, options: object = ALL) -> list[RawRow]:
    return list(ParquetSource((path,), options))


def csv_rows(path: Path, content: bytes | str, options: object = ALL) -> list[RawRow]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(CsvSource((path,), options))


def columns(rows: Sequence[RawRow]) -> list[Any]:
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.columns for row in rows]


def rows_until_damage(source: ParquetSource | CsvSource) -> tuple[list[RawRow], str]:
    """Return the rows of a damaged source, and the message of the error at their end."""
    rows: list[RawRow] = []
    with pytest.raises(JobError) as error:
        rows.extend(source)
    return rows, str(error.value)


class TestParquet:
    @pytest.mark.parametrize(
        "values",
        [
            pa.array(["é", None, ""]),
            pa.array(["é", None, ""], pa.large_string()),
            pa.array(["é", None, ""], pa.string_view()),
            pa.array(["é", None, ""]).dictionary_encode(),
            pa.array([b"\xff", None, b""], pa.large_binary()),
            pa.array([b"ab", None, b"cd"], pa.binary(2)),
            pa.array([1, None, -(2**63)]),
            pa.array([1, None, 2**64 - 1], pa.uint64()),
            pa.array([1.5, None, 0.1]),
            pa.array([1.5, None, 2.0], pa.float16()),
            pa.array([True, None, False]),
            pa.array([None, None, None]),
            pa.array([[["a"], None, []], None, []]),
            pa.array([["a", "b"], None, ["c", "d"]], pa.list_(pa.string(), 2)),
            pa.array([PICTURE, None, {"bytes": None, "path": "a.png"}]),
            pa.array([[PICTURE, PICTURE], None, []]),
            pa.array([[{"role": "user", "content": [{"type": "image", "text": None}]}], None, []]),
        ],
        ids=lambda values: str(values.type),
    )
    def test_plain_values(self, tmp_path: Path, values: pa.Array) -> None:
        path = write(tmp_path / "a.parquet", {"x": values})
        expected = [{"x": value} for value in values.to_pylist()]
        for options in (ALL, needs("x")):
            assert columns(parquet_rows(path, options)) == expected

    def test_values_of_other_types(self, tmp_path: Path) -> None:
        noon = datetime.datetime(2026, 1, 1, 12)
        values = {
            "s": (pa.array([noon], pa.timestamp("s")), noon),
            "ns": (pa.array([noon], pa.timestamp("ns")), noon),
            "utc": (pa.array([noon], pa.timestamp("ns", "UTC")), noon.replace(tzinfo=datetime.UTC)),
            "date": (pa.array([noon.date()]), noon.date()),
            "decimal": (pa.array([Decimal("1.50")]), Decimal("1.50")),
            "time": (pa.array([noon.time()]), noon.time()),
            "duration": (pa.array([1], pa.duration("s")), datetime.timedelta(0, 1)),
            "map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), [("a", 1)]),
        }
        path = write(tmp_path / "a.parquet", {name: value for name, (value, _) in values.items()})
        (row,) = columns(parquet_rows(path))
        assert row == {name: value for name, (_, value) in values.items()}
        # No type is one of pandas, which need not be installed
        assert {type(value).__module__ for value in row.values()} <= {
            "builtins",
            "datetime",
            "decimal",
        }

    def test_what_python_cannot_hold_costs_nothing_unless_it_is_used(self, tmp_path: Path) -> None:
        far = 400_000_000_000_000_000
        twice = pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["x", "x"])
        deep: Any = pa.array(["a", "b"])
        for _ in range(33):
            deep = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), deep)
        values = {
            "far": pa.array([0, far], pa.timestamp("us")),
            "ns": pa.array([1000, 1], pa.timestamp("ns")),
            "span": pa.array([1000, 1], pa.duration("ns")),
            "twice": twice,
            "deep": deep,
            "fits": deep.flatten(),
        }
        path = write(tmp_path / "a.parquet", {"y": ["a", "b"], **values})
        first, last = columns(parquet_rows(path))
        for name in ("twice", "deep"):
            assert isinstance(first[name], UnreadableValue)
        for name in ("far", "ns", "span"):
            assert not isinstance(first[name], UnreadableValue)
        for name in ("far", "ns", "span", "twice", "deep"):
            assert isinstance(last[name], UnreadableValue)
        assert isinstance(last["fits"], list)
        assert last["y"] == "b"

    def test_extension_type_is_what_it_stores(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": pa.array(['{"a": 1}'], pa.json_())})
        assert columns(parquet_rows(path)) == [{"x": '{"a": 1}'}]

    def test_bad_utf8_costs_its_row(self, tmp_path: Path) -> None:
        text = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
        nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), text)
        for value, one in ((text, "b"), (nested, ["b"])):
            path = write(tmp_path / "a.parquet", {"x": value, "y": [1, 2, 3]})
            first, bad, last = parquet_rows(path)
            assert first.error is None
            assert bad.columns is None
            assert bad.error == RowError(
                "encoding", "parse", "column 'x' must be UTF-8, got other bytes"
            )
            assert last.columns == {"x": one, "y": 3}
            assert [row.columns for row in parquet_rows(path, needs("y"))][1] == {"y": 2}

    def test_places_and_order_of_several_files(self, tmp_path: Path) -> None:
        first = write(tmp_path / "b.parquet", {"x": list(range(150))}, row_group_size=70)
        second = write(tmp_path / "a.parquet", {"y": ["z"]})
        source = ParquetSource((first, str(second)), ALL)
        assert source.form == "columns"
        assert source.files == (first, second)
        rows = list(source)
        assert rows == list(source)
        assert columns(rows) == [{"x": number} for number in range(150)] + [{"y": "z"}]
        places = [f"b.parquet: row {number}" for number in range(150)] + ["a.parquet: row 0"]
        assert [row.place for row in rows] == places
        assert {row.default_id for row in rows} == {None}

    def test_row_groups_in_front_of_a_row_are_not_read(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a.parquet", {"x": list(range(150))}, row_group_size=70)
        second = write(tmp_path / "b.parquet", {"x": list(range(9))}, row_group_size=4)
        source = ParquetSource((first, second), ALL)
        rows = list(source)
        for count, unread in [
            (0, 0),
            (69, 0),
            (70, 70),
            (149, 140),
            (154, 154),
            (157, 154),
            (159, 159),
        ]:
            found = list(source.rows_behind(count))
            is_read = [row is not UNREAD for row in found]
            # The last row group of the first file is read for a row of its own alone
            whole = [True] * 159
            whole[:unread] = [False] * unread
            assert is_read == whole
            assert found[unread:] == rows[unread:]

    def test_only_needed_columns_are_read(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet",
            {"a.b": ["x"] * 3, "a": [{"b": "y"}] * 3, "c": [None, 1, 2], "d": ["unused"] * 3},
        )
        assert columns(parquet_rows(path, needs("c", "a.b", "absent")))[1] == {"c": 1, "a.b": "x"}
        assert columns(parquet_rows(path, needs("a")))[1] == {"a": {"b": "y"}}
        assert columns(parquet_rows(path, needs())) == [{}] * 3
        # A damaged column that nobody needs is not noticed
        content = path.read_bytes()
        assert content.count(b"unused") > 0
        path.write_bytes(content.replace(b"unused", b"\xff\xff\xff\xff\xff\xff"))
        assert len(columns(parquet_rows(path, needs("c")))) == 3
        assert parquet_rows(path, needs("d"))[0].error is not None

    def test_memory_is_bounded_in_a_large_row_group(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pictures = [os.urandom(1 << 14)] * 10 + [os.urandom(1 << 14) for _ in range(1990)]
        path = write(tmp_path / "a.parquet", {"image": pictures}, write_batch_size=16)
        assert pq.ParquetFile(path).num_row_groups == 1
        largest = 0

        class File(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                nonlocal largest
                assert size is not None
                largest = max(largest, size)
                return super().read(size)

        monkeypatch.setattr(table, "open_input", File)
        before = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(before)
        pa.set_memory_pool(pool)
        try:
            for row, picture in zip(ParquetSource((path,), ALL), pictures, strict=True):
                assert row.columns == {"image": picture}
        finally:
            pa.set_memory_pool(before)
        # The row group has 32 MB
        assert 1 << 20 < pool.max_memory() < 12 << 20
        assert 1 << 14 < largest < 2 << 20

    @pytest.mark.parametrize(
        ("row_bytes", "num_rows"), [(10, 64), (1 << 20, 16), (32 << 20, 1), (-1, 64)]
    )
    def test_batches_have_fewer_rows_if_rows_are_large(self, row_bytes: int, num_rows: int) -> None:
        group = SimpleNamespace(num_rows=100, total_byte_size=100 * row_bytes)
        assert table.rows_a_batch(group) == num_rows
        empty = SimpleNamespace(num_rows=0, total_byte_size=0)
        assert table.rows_a_batch(empty) == 64

    def test_what_datasets_writes(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "images": [datasets.Image()],
                "label": datasets.ClassLabel(names=["cat", "dog"]),
                "text": datasets.Value("large_string"),
            }
        )
        row = {"image": PICTURE, "images": [PICTURE, PICTURE], "label": 1, "text": "é"}
        written = datasets.Dataset.from_list([row] * 3, features=features)
        with open(tmp_path / "a.parquet", "wb") as file:
            written.to_parquet(file)
        assert columns(parquet_rows(tmp_path / "a.parquet")) == [row] * 3


class TestBrokenParquet:
    @pytest.mark.parametrize(
        "content", [b"", b"PAR1", b"no table" * 100, b"PAR1" + bytes(50) + b"PAR1"]
    )
    def test_no_parquet(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(JobError, match=r"/a\.parquet: cannot be read: \w+$"):
            parquet_rows(tmp_path / "a.parquet")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="a: cannot be read: No such file or directory"):
            parquet_rows(tmp_path / "a")

    def test_folder_and_pipe_are_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
            for source in (ParquetSource((path,), ALL), CsvSource((path,), ALL)):
                with pytest.raises(JobError, match="must be a file that can be read twice"):
                    list(source)

    def test_rows_before_the_damage_stand(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet",
            {"x": list(range(300))},
            row_group_size=100,
            compression="gzip",
        )
        chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
        content = bytearray(path.read_bytes())
        begin = chunk.data_page_offset
        content[begin + 20 : begin + 60] = bytes(40)
        path.write_bytes(content)
        rows, message = rows_until_damage(ParquetSource((path,), ALL))
        assert columns(rows) == [{"x": number} for number in range(100)]
        assert message == f"{path}: cannot be read at row 100: OSError"

    def test_every_cut_is_noticed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": ["a", "b"]})
        content = path.read_bytes()
        for size in [*range(8), *range(8, len(content), 50), len(content) - 1]:
            path.write_bytes(content[:size])
            with pytest.raises(JobError):
                parquet_rows(path)

    def test_checksums_of_pages_are_checked(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet",
            {"x": ["before", "damaged"]},
            write_page_checksum=True,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        content = path.read_bytes()
        assert content.count(b"damaged") == 1
        path.write_bytes(content.replace(b"damaged", b"DAMAGED"))
        with pytest.raises(JobError, match="cannot be read at row 0: OSError"):
            parquet_rows(path)

    def test_flipped_bits(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pictures = [{"bytes": b"%d" % number, "path": None} for number in range(20)]
        write(path, {"x": pictures, "y": ["é"] * 20}, row_group_size=7, compression="none")
        content = path.read_bytes()
        noticed = 0
        for bit in range(0, 8 * len(content), 61):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                rows = parquet_rows(path)
            except JobError:
                noticed += 1
            else:
                assert len(rows) == 20
        assert noticed > 50

    def test_columns_with_one_name(self, tmp_path: Path) -> None:
        pq.write_table(pa.table([[1], [2]], names=["x", "x"]), tmp_path / "a.parquet")
        with pytest.raises(JobError, match="columns must have different names, got 'x' twice"):
            parquet_rows(tmp_path / "a.parquet")

    def test_missing_library_is_named_with_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ConfigError, match=r"pip install '\.\[parquet\]'"):
            ParquetSource((tmp_path / "a",), ALL)


class TestCsv:
    def test_values_are_text_and_empty_cells_none(self, tmp_path: Path) -> None:
        rows = csv_rows(tmp_path / "a.csv", 'id,q,n\n001,"a ""b"",\nc",NA\n,"é",1.0\n')
        assert columns(rows) == [
            {"id": "001", "q": 'a "b",\nc', "n": "NA"},
            {"id": None, "q": "é", "n": "1.0"},
        ]
        assert [row.place for row in rows] == ["a.csv: line 2", "a.csv: line 4"]

    @pytest.mark.parametrize(
        "content",
        ["\ufeffa,b\r\n1,2\r\n\r\n3,4", "\n\na,b\n1,2\n3,4\n\n", '"a","b"\r1,2\r3,4\r'],
        ids=["BOM, CRLF, no final newline", "blank lines", "CR"],
    )
    def test_line_ends(self, tmp_path: Path, content: str) -> None:
        rows = csv_rows(tmp_path / "a.csv", content)
        assert columns(rows) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]

    def test_needed_columns(self, tmp_path: Path) -> None:
        rows = csv_rows(tmp_path / "a.csv", "a,b\n1,2\n", needs("b", "absent"))
        assert columns(rows) == [{"b": "2"}]

    def test_a_bad_line_costs_its_row(self, tmp_path: Path) -> None:
        lines = [
            b"a,b",
            b"1,2",
            b"1",
            b"1,2,3",
            b'"1"x,2',
            b"\xff,2",
            b"\0,2",
            "é,2".encode(),
            b'5,"6',
        ]
        rows = csv_rows(tmp_path / "a.csv", b"\n".join(lines))
        bad = "must have 2 cells as the first line, got "
        quote = "must be comma-separated values, got a quote that is out of place or open"
        assert [row.error or row.columns for row in rows] == [
            {"a": "1", "b": "2"},
            RowError("schema", "parse", f"{bad}1"),
            RowError("schema", "parse", f"{bad}3"),
            RowError("schema", "parse", quote),
            RowError("encoding", "parse", "must be UTF-8, got other bytes"),
            {"a": "\0", "b": "2"},
            {"a": "é", "b": "2"},
            RowError("schema", "parse", quote),
        ]
        assert [row.place for row in rows] == [f"a.csv: line {number}" for number in range(2, 10)]

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_long_line_costs_its_row_and_is_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        monkeypatch.setattr(table, "MOST_CHARACTERS", 50)
        fits, long = "x" * (49 - len(end)), "y" * 1000
        bad = [f"{long},", f'"{long}",z', f'"{long}{end}1,2",z', f'1,"2{end}{long}"']
        rows = csv_rows(tmp_path / "a.csv", end.join(["a,b", f"{fits},", *bad, "3,4"]))
        assert rows[0].columns == {"a": fits, "b": None}
        assert [row.place.partition(" ")[2] for row in rows] == [
            f"line {line}" for line in (2, 3, 4, 5, 7, 9)
        ]
        message = "a line must have at most "
        assert [row.error and row.error.message[: len(message)] for row in rows[1:]] == [
            *[message] * 4,
            None,
        ]
        assert rows[-1].columns == {"a": "3", "b": "4"}

    def test_an_open_quote_is_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(table, "MOST_CHARACTERS", 1000)
        before = csv.field_size_limit(1000)
        try:
            rows = csv_rows(tmp_path / "a.csv", 'a,b\n1,"2\n' + "x,y\n" * 1000 + "3,4\n")
        finally:
            csv.field_size_limit(before)
        assert rows[0].error is not None
        assert rows[0].place == "a.csv: line 2"
        assert rows[-1].columns == {"a": "3", "b": "4"}

    @pytest.mark.parametrize(
        ("name", "pack"), [("a.csv.gz", gzip.compress), ("a.csv.zst", zstandard.compress)]
    )
    def test_packed(self, tmp_path: Path, name: str, pack: Any) -> None:
        rows = csv_rows(tmp_path / name, pack(b"a,b\n1,2\n"))
        assert columns(rows) == [{"a": "1", "b": "2"}]
        assert rows[0].place == f"{name}: line 2"

    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            (b"", "must begin with the names of columns"),
            (b"\n\n", "must begin with the names of columns"),
            (b"a,a\n", "columns must have different names, got 'a' twice"),
            (b"a,\xff\n", "the first line must name the columns in UTF-8"),
            (b'a,"b', "the first line must name the columns in UTF-8"),
        ],
    )
    def test_header(self, tmp_path: Path, content: bytes, wanted: str) -> None:
        with pytest.raises(JobError, match=rf"/a\.csv: {wanted}"):
            csv_rows(tmp_path / "a.csv", content)

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        content = "a,b\n" + "".join(f"{number},x\n" for number in range(30_000))
        path = tmp_path / "a.csv.gz"
        packed = gzip.compress(content.encode())
        path.write_bytes(packed[: len(packed) // 2])
        rows, message = rows_until_damage(CsvSource((path,), ALL))
        assert len(rows) > 1000
        assert columns(rows[:1]) == [{"a": "0", "b": "x"}]
        assert message == f"{path}: cannot be read at line {len(rows) + 2}: EOFError"


@pytest.fixture(autouse=True)
def _limit_of_cells() -> Iterator[None]:
    before = csv.field_size_limit()
    yield
    csv.field_size_limit(before)
