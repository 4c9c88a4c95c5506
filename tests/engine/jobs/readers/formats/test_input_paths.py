"""Names of inputs: files, folders and patterns, their order, format and source."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.readers.formats.input_paths import InputName, expand_ranges, find_inputs
from idefics2_engine.jobs.readers.formats.open_sources import open_sources
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.source import RawRow
from idefics2_engine.jobs.store.input_files import InputFile
from job_inputs import DEFAULTS, input_options, write_rows
from memory_storage import storage_in_memory

READERS = "idefics2_engine.jobs.readers"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *names: str, given: str = "auto") -> list[tuple[str, str]]:
    inputs = find_inputs(tuple(f"{folder}/{name}".rstrip("/") for name in names), given)
    return [(one.name.removeprefix(f"{folder}/"), one.format) for one in inputs]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"), ("a.JSONL.gz", "jsonl"), ("a.ndjson.zst", "jsonl"), ("a.csv", "csv"),
        ("a.csv.gz", "csv"), ("a.parquet", "parquet"), ("a.tar", "webdataset"),
        ("a.tar.gz", "webdataset"), ("a.tgz", "webdataset"), ("a.jpg", "images"), ("a.PNG", "images"),
        ("a.heic", "images"),
    ],
)  # fmt: skip
def test_names_show_the_format(tmp_path: Path, name: str, kind: str) -> None:
    touch(tmp_path, name)
    assert found(tmp_path, name) == [(name, kind)]
    assert found(tmp_path, name, given="openai") == [(name, "openai")]


def test_files_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.jsonl", "c.jsonl", "sub/d.jsonl", ".hidden.jsonl", "notes.md")
    names = [(f"{name}.jsonl", "jsonl") for name in "abc"]
    assert found(tmp_path, "c.jsonl", "a.jsonl", "b.jsonl") == names
    assert found(tmp_path, "") == names
    assert found(tmp_path, "*.jsonl") == names
    assert found(tmp_path, "**/*.jsonl") == [*names, ("sub/d.jsonl", "jsonl")]
    assert found(tmp_path, "[ab].jsonl") == names[:2]
    # A name that is there is no pattern
    touch(tmp_path, "[ab].jsonl")
    assert found(tmp_path, "[ab].jsonl") == [("[ab].jsonl", "jsonl")]


def test_folders(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/deep/a.png", "pictures/notes.txt")
    assert find_inputs((f"{tmp_path}/pictures",), "auto") == [
        InputName(f"{tmp_path}/pictures", "images", tmp_path / "pictures")
    ]
    # Images beside questions are the images of the questions
    touch(tmp_path, "both/a.png", "both/q.jsonl")
    assert found(tmp_path, "both") == [("both/q.jsonl", "jsonl")]
    assert found(tmp_path, "both", given="images") == [("both", "images")]
    touch(tmp_path, "mixed/a.csv", "mixed/b.parquet")
    assert found(tmp_path, "mixed", given="csv") == [("mixed/a.csv", "csv")]
    with pytest.raises(ConfigError, match="must have files of one format, got csv, parquet"):
        found(tmp_path, "mixed")
    touch(tmp_path, "neither/notes.txt")
    for given in ("auto", "jsonl", "images"):
        with pytest.raises(ConfigError, match="must have input files, got none"):
            found(tmp_path, "neither", given=given)


def test_names_of_nothing_are_errors(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "a.jsonl")
    with pytest.raises(ConfigError, match=r"no\.jsonl: must be an input file, got no such file"):
        found(tmp_path, "no.jsonl")
    with pytest.raises(ConfigError, match="inputs must name files, got no file like"):
        found(tmp_path, "*.csv")
    with pytest.raises(ConfigError, match=r"a\.txt: the format must be given"):
        found(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match="inputs must name each file once"):
        found(tmp_path, "a.jsonl", "*.jsonl")
    with pytest.raises(ConfigError, match="standard input must be staged"):
        find_inputs(("-",), "auto")


class StandIn:
    """A source that keeps what it was called with."""

    form = "columns"
    files: tuple[Path, ...] = ()

    def __init__(self, names: Any, options: InputOptions) -> None:
        self.names = names
        self.options = options

    def __iter__(self) -> Iterator[RawRow]:
        return iter(())


def test_sources_are_made_by_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "table": ("ParquetSource", "CsvSource"),
        "image_folder": ("ImageFolderSource",),
        "tar_shards": ("TarShardSource",),
        "datasets_hub": ("HubSource",),
    }
    for name, classes in sources.items():
        module: Any = ModuleType(name)
        for one in classes:
            setattr(module, one, type(one, (StandIn,), {}))
        monkeypatch.setitem(sys.modules, f"{READERS}.formats.{name}", module)
    touch(tmp_path, "1.parquet", "2.parquet", "3.csv", "5.tar", "pictures/a.png")
    write_rows(tmp_path / "4.jsonl", [{"custom_id": "a", "body": {}}])
    names = ("hf:org/name:train", *(f"{tmp_path}/{name}" for name in ("[1-5]*", "pictures")))
    options = InputOptions(inputs=names)
    made = open_sources(find_inputs(names, "auto"), options)
    shown: list[Any] = [(type(one).__name__, getattr(one, "names", one.form)) for one in made]
    assert shown == [
        ("ParquetSource", [tmp_path / "1.parquet", tmp_path / "2.parquet"]),
        ("CsvSource", [tmp_path / "3.csv"]),
        ("JsonlSource", "openai"),
        ("TarShardSource", [tmp_path / "5.tar"]),
        ("ImageFolderSource", [tmp_path / "pictures"]),
        ("HubSource", "hf:org/name:train"),
    ]
    assert all(one.options is options for one in made if isinstance(one, StandIn))


def test_remote_names_are_expanded_and_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("remote_files")
    module.expand_remote = lambda url: [url.replace("*", name) for name in "ab"]
    monkeypatch.setitem(sys.modules, f"{READERS}.files.remote_files", module)
    table: Any = ModuleType("table")
    table.CsvSource = StandIn
    monkeypatch.setitem(sys.modules, f"{READERS}.formats.table", table)
    inputs = find_inputs(("s3://bucket/*.csv",), "auto")
    assert inputs == [InputName(f"s3://bucket/{n}.csv", "csv", None) for n in "ab"]
    (source,) = open_sources(inputs, input_options("s3://bucket/*.csv"))
    assert isinstance(source, StandIn)
    names: Sequence[str] = source.names
    assert names == ["s3://bucket/a.csv", "s3://bucket/b.csv"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{00..01}/{8..9}", ["00/8", "00/9", "01/8", "01/9"]),
        ("s3://b/{099..100}.tar", ["s3://b/099.tar", "s3://b/100.tar"]),
        ("{a,b}.tar", ["{a,b}.tar"]),
    ],
)
def test_ranges_stand_for_names(name: str, expected: list[str]) -> None:
    assert expand_ranges(name) == expected


@pytest.mark.parametrize("name", ["{2..1}", "{0..100000}", "{0..999}{0..999}", "{1..1}{3..2}"])
def test_ranges_of_too_many_or_none_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must stand for 1 to 100000 files"):
        expand_ranges(name)


def test_ranges_of_names_are_inputs(tmp_path: Path) -> None:
    touch(tmp_path, "s-00.tar", "s-01.tar", "t-{0..1}.tar")
    shards = [(f"{name}.tar", "webdataset") for name in ("s-00", "s-01", "t-{0..1}")]
    assert found(tmp_path, "s-{00..01}.tar", "t-{0..1}.tar") == shards
    with pytest.raises(ConfigError, match=r"s-02\.tar: must be an input file, got no such file"):
        found(tmp_path, "s-{00..02}.tar")


def test_identity_is_of_every_kind_of_input(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/a.png", "pictures/deep/b.png", "pictures/notes.txt")
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": "a"}])

    def identity(*names: str) -> list[InputFile]:
        options = input_options(*names, prompt="What?", media_root=tmp_path)
        return list(JobInput(options, DEFAULTS).identify())

    folder = f"{tmp_path}/pictures"
    before = identity(str(path), folder)
    assert before[1] == InputFile(str(path), path.stat().st_size, path.stat().st_mtime_ns)
    assert identity(str(path), folder) == before
    # A folder's own time of change says nothing of folders in it
    touch(tmp_path, "pictures/deep/c.png")
    with_another = identity(str(path), folder)
    assert [one.path for one in with_another] == [folder, str(path)]
    assert with_another[0] != before[0]
    with storage_in_memory("s3") as storage:
        storage.pipe("bucket/s-0.jsonl", b"{}")
        (remote,) = identity("s3://bucket/s-{0..0}.jsonl")
        storage.pipe("bucket/s-0.jsonl", b"{ }")
        (later,) = identity("s3://bucket/s-{0..0}.jsonl")
    assert (remote.path, remote.size, later.size) == ("s3://bucket/s-0.jsonl", 2, 3)
    # Nothing says whether a dataset has changed
    assert identity(str(path), "hf:org/name:train") == []
