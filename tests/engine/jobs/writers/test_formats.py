"""Formats of outputs: each is read back with another library, and equal rows give equal bytes."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.writers.formats import make_format, saved_fields
from idefics2_engine.jobs.writers.ordered_writer import OrderedWriter
from idefics2_engine.jobs.writers.output_file import MakeFormat, OutputFile
from idefics2_engine.jobs.writers.parquet_format import ParquetFormat
from idefics2_engine.jobs.writers.row_output import SaveOptions
from job_files import CountedFiles, Killed, KilledFiles, ShortFiles
from job_outputs import ALL, mixed_rows
from stand_in_job import run_job

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
pytest.importorskip("zstandard", reason="needs the extra parquet")
ROWS = mixed_rows(60)
LINES = b"".join(row + b"\n" for row in ROWS)
NAMES = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")


def format_of(name: str, output_format: str = "auto", save: SaveOptions = ALL) -> MakeFormat:
    return make_format(Path(name), output_format, save, model="demo", fingerprint="f" * 64)


def written(path: Path, make: MakeFormat, rows: list[bytes] = ROWS) -> bytes:
    """Write rows as a job does; return the file's bytes, of which size and hash are known."""
    file = OutputFile(path)
    formatted = make(file)
    for row in rows:
        formatted.write_row(row)
    formatted.finish()
    file.sync()
    file.close()
    content = path.read_bytes()
    assert file.size == len(content)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    return content


def table(content: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    return rows


def test_gzip_is_read_by_gzip(tmp_path: Path) -> None:
    content = written(tmp_path / "a", format_of("a.jsonl.gz"))
    assert gzip.decompress(content) == LINES
    # The header has neither a name nor a time
    assert content[3] == 0
    assert content[4:8] == bytes(4)


def test_zstandard_is_read_by_arrow(tmp_path: Path) -> None:
    content = written(tmp_path / "a", format_of("a.jsonl.zst"))
    with pyarrow.input_stream(io.BytesIO(content), compression="zstd") as stream:
        assert stream.read() == LINES
    # A flipped bit is noticed, because the frame has a checksum
    damaged = bytearray(content)
    damaged[-1] ^= 1
    with (
        pytest.raises(OSError, match="checksum"),
        pyarrow.input_stream(io.BytesIO(damaged), compression="zstd") as stream,
    ):
        stream.read()


def test_parquet_has_the_rows(tmp_path: Path) -> None:
    got = table(written(tmp_path / "a", format_of("a.parquet")))
    assert len(got) == len(ROWS)
    for row, encoded in zip(got, ROWS, strict=True):
        wanted = json.loads(encoded)
        assert json.loads(row["keep"]) == wanted["keep"]
        assert row["id"] == str(wanted["id"])
        for key in ("row", "usage", "error"):
            assert row[key] == wanted[key]
        for key in ("prompt", "image_info"):
            assert row[key] == wanted.get(key)
        for answer, one in zip(row["outputs"], wanted["outputs"], strict=True):
            for key in ("text", "token_ids", "logprobs", "finish_reason"):
                assert answer[key] == one[key]
            stop = one["stop_reason"]
            assert answer["stop_token_id"] == (stop if isinstance(stop, int) else None)
            if isinstance(stop, str):
                stop = stop.replace("\ud83d", r"\ud83d")
                assert answer["stop_reason"] == stop
            else:
                assert answer["stop_reason"] is None


@pytest.mark.parametrize("save", [SaveOptions(), SaveOptions(prompt=True), ALL])
def test_parquet_schema_depends_on_the_options_alone(save: SaveOptions, tmp_path: Path) -> None:
    """Rows that are all errors, or no rows, have the same columns as answers."""
    rows = mixed_rows(9, save)
    schemas = []
    for some in (rows, rows[:3], []):
        content = written(tmp_path / "a", format_of("a.parquet", save=save), some)
        read = pyarrow.parquet.read_table(io.BytesIO(content))
        assert read.num_rows == len(some)
        schemas.append(read.schema)
    assert schemas[0] == schemas[1] == schemas[2]
    assert schemas[0].field("outputs").type.value_type.field("text").type == pyarrow.string()
    assert ("prompt" in schemas[0].names) == save.prompt


def test_parquet_is_read_by_datasets_and_pandas(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "a.parquet"
    written(path, format_of("a.parquet"))
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert found[4]["outputs"][0]["text"] == json.loads(ROWS[4])["outputs"][0]["text"]
    frame = pandas.read_parquet(path)
    assert frame["error"][0] == {"code": "image", "stage": "media", "message": "images[0]: no"}
    assert list(frame["row"]) == list(range(60))


def test_row_groups_end_by_rows_and_by_bytes(tmp_path: Path) -> None:
    def groups(**limits: Any) -> list[int]:
        content = written(tmp_path / "a", partial(ParquetFormat, save=ALL, **limits))
        assert table(content) == whole
        data = pyarrow.parquet.ParquetFile(io.BytesIO(content)).metadata
        return [data.row_group(index).num_rows for index in range(data.num_row_groups)]

    whole = table(written(tmp_path / "b", format_of("a.parquet")))
    assert groups() == [60]
    assert groups(group_rows=25) == [25, 25, 10]
    assert groups(group_rows=30) == [30, 30]
    sizes, most = [], max(map(len, ROWS))
    for limit in (1, most, 3 * most):
        sizes.append(groups(group_bytes=limit))
    assert sizes[0] == [1] * 60
    assert 20 < len(sizes[1]) < 60
    assert len(sizes[2]) < len(sizes[1])


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str, tmp_path: Path) -> None:
    content = written(tmp_path / "a", format_of(name), [])
    if name == "a.parquet":
        assert table(content) == []
    elif name == "a.jsonl.zst":
        with pyarrow.input_stream(io.BytesIO(content), compression="zstd") as stream:
            assert stream.read() == b""
    else:
        assert (gzip.decompress(content) if name == "a.jsonl.gz" else content) == b""


def small_groups(name: str) -> MakeFormat:
    """Return a format whose file is written in several parts."""
    if name == "a.parquet":
        return partial(ParquetFormat, save=ALL, group_rows=4)
    return format_of(name.removeprefix("openai "), "openai" if "openai" in name else "auto")


def answer(number: int, row: str) -> bytes:
    assert row == f"row {number}"
    return ROWS[number]


@pytest.mark.parametrize("name", [*NAMES, "openai a.jsonl", "openai a.jsonl.gz"])
def test_kills_change_no_byte(name: str, tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(11)]
    run = partial(run_job, rows=rows, answer=answer, make_format=small_groups(name))
    files = CountedFiles()
    run(tmp_path / "whole", files=files)
    wanted = (tmp_path / "whole").read_bytes()
    for at in range(len(files.calls)):
        out = tmp_path / str(at)
        with pytest.raises(Killed):
            run(out, files=KilledFiles(at, at % 3 / 2))
        run(out, files=ShortFiles(1 + 97 * at), seed=at + 1, window=at % 4, in_flight=1 + at % 5)
        assert out.read_bytes() == wanted


@pytest.mark.parametrize("name", NAMES)
def test_output_that_failed_is_closed_quietly(name: str, tmp_path: Path) -> None:
    """A format that is dropped before its end writes nothing more, and warns of nothing."""

    class Damaged:
        def read(self, record: int, row: int) -> bytes:
            if row == 9:
                raise JobError("row 9")
            return ROWS[row]

    path = tmp_path / "a"
    writer = OrderedWriter(path, Damaged(), window=0, make_format=small_groups(name))
    for row in range(9):
        writer.finish_row(row, row)
    with pytest.raises(JobError, match="row 9"):
        writer.finish_row(9, 9)
    writer.close()
    size = path.stat().st_size
    del writer
    assert path.stat().st_size == size


def test_names_decide(tmp_path: Path) -> None:
    for name in ("a.json", "jsonl", "a.jsonl.xz", "a.csv"):
        with pytest.raises(ConfigError, match=r"--output must end with one of \.jsonl, .*parquet"):
            format_of(name)
    with pytest.raises(ConfigError, match=r"openai must write lines, got 'a.parquet'"):
        format_of("a.parquet", "openai")
    with pytest.raises(ConfigError, match="--output-format must be one of auto, openai"):
        format_of("a.jsonl", "csv")


def test_saved_fields_have_a_place() -> None:
    assert saved_fields("prompt", "auto", ["a"]) == SaveOptions(prompt=True)
    for text in ("", "logprobs"):
        assert saved_fields(text, "openai") == SaveOptions(logprobs=True)
    with pytest.raises(ConfigError, match=r"must be without --save and --keep.*got 'prompt'"):
        saved_fields("prompt", "openai")
    with pytest.raises(ConfigError, match="got 'title'"):
        saved_fields("", "openai", ["title"])


@pytest.mark.parametrize(
    ("name", "library"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_missing_library_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    wanted = rf"{library} must be installed .*pip install '\.\[parquet\]'"
    with pytest.raises(ConfigError, match=wanted):
        format_of(name)


def test_tools_of_the_system_read_gzip(tmp_path: Path) -> None:
    tool = shutil.which("gzip")
    if tool is None:
        pytest.skip("there is no gzip")
    path = tmp_path / "a.jsonl.gz"
    written(path, format_of("a.jsonl.gz"))
    done = subprocess.run([tool, "-dc", path], capture_output=True, check=True)
    assert done.stdout == LINES
