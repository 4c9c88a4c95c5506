"""Remote files, by storage in memory: reading, identity, folders and patterns, and errors."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.readers.files.named_files import base_name, shown_name
from idefics2_engine.jobs.readers.files.remote_files import (
    expand_remote,
    identify_remote,
    open_remote,
)
from idefics2_engine.jobs.readers.formats.table import CsvSource, ParquetSource
from idefics2_engine.jobs.readers.formats.tar_shards import TarShardSource
from idefics2_engine.jobs.store.input_files import InputFile
from memory_storage import storage_in_memory

ALL = SimpleNamespace()


@pytest.fixture(params=["s3", "gs"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def storage(scheme: str) -> Iterator[Any]:
    with storage_in_memory(scheme) as storage:
        yield storage


def test_fsspecs_own_memory() -> None:
    fsspec.filesystem("memory").pipe("/bucket/a", b"content")
    try:
        with open_remote("memory://bucket/a") as file:
            assert file.read() == b"content"
            file.seek(3)
            assert file.read(2) == b"te"
        assert identify_remote("memory://bucket/a").size == 7
        assert expand_remote("memory://bucket") == ["memory://bucket/a"]
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


class TestSources:
    def test_parquet(self, storage: Any, scheme: str) -> None:
        with storage.open("bucket/a.parquet", "wb") as file:
            pq.write_table(pa.table({"x": [1, 2]}), file)
        source = ParquetSource((f"{scheme}://bucket/a.parquet",), ALL)
        assert source.files == ()
        rows = list(source)
        assert [row.columns for row in rows] == [{"x": 1}, {"x": 2}]
        assert [row.place for row in rows] == ["a.parquet: row 0", "a.parquet: row 1"]

    def test_csv(self, storage: Any, scheme: str, tmp_path: Path) -> None:
        storage.pipe("bucket/a.csv", b"x\n1\n")
        (tmp_path / "b.csv").write_bytes(b"x\n2\n")
        source = CsvSource((f"{scheme}://bucket/a.csv", tmp_path / "b.csv"), ALL)
        assert [row.columns for row in source] == [{"x": "1"}, {"x": "2"}]
        assert source.files == (tmp_path / "b.csv",)

    def test_tar(self, storage: Any, scheme: str) -> None:
        import tarfile

        with (
            storage.open("bucket/s-1.tar", "wb") as file,
            tarfile.open(fileobj=file, mode="w") as archive,
        ):
            archive.addfile(tarfile.TarInfo("a.png"))
        (row,) = TarShardSource((f"{scheme}://bucket/s-1.tar",), ALL)
        assert row.default_id == "s-1.tar/a"
        assert row.columns == {"images": [b""]}

    def test_missing(self, storage: Any, scheme: str) -> None:
        url = f"{scheme}://key:secret@bucket/a"
        for source in (
            ParquetSource((url,), ALL),
            CsvSource((url,), ALL),
            TarShardSource((url,), ALL),
        ):
            with pytest.raises(JobError) as error:
                list(source)
            assert str(error.value) == f"{scheme}://bucket/a: cannot be read: FileNotFoundError"


class TestIdentity:
    def test_changes_with_the_file(self, storage: Any, scheme: str) -> None:
        url = f"{scheme}://bucket/a"
        storage.pipe("bucket/a", b"one")
        first = identify_remote(url)
        assert first == identify_remote(url)
        assert first[:2] == (url, 3)
        assert 0 <= first.mtime_ns < 2**63
        # The time of change is that of the stand-in's clock
        storage.store["/bucket/a"].modified = storage.modified("bucket/a").replace(year=2001)
        assert identify_remote(url)[:2] == (url, 3)
        assert identify_remote(url) != first

    @pytest.mark.parametrize("key", ["ETag", "etag"])
    def test_etag_takes_precedence_over_the_time(
        self, storage: Any, scheme: str, key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.pipe("bucket/a", b"one")
        original = type(storage).info
        tag = "x"
        monkeypatch.setattr(
            type(storage), "info", lambda *args, **options: original(*args, **options) | {key: tag}
        )
        first = identify_remote(f"{scheme}://bucket/a")
        storage.store["/bucket/a"].modified = storage.modified("bucket/a").replace(year=2001)
        assert identify_remote(f"{scheme}://bucket/a") == first
        tag = "y"
        second = identify_remote(f"{scheme}://bucket/a")
        assert second != first
        assert second == InputFile(f"{scheme}://bucket/a", 3, second.mtime_ns)

    def test_listings_are_not_remembered(
        self, storage: Any, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        storage.pipe("bucket/a", b"one")
        monkeypatch.setattr(
            type(storage), "invalidate_cache", lambda *_args: calls.append("invalidated")
        )
        identify_remote(f"{scheme}://bucket/a")
        assert calls == ["invalidated"]


class TestNames:
    def test_folders_and_patterns(self, storage: Any, scheme: str) -> None:
        for name in ("b.parquet", "a.parquet", "c.csv", "sub/d.parquet", "p/q.parquet/e"):
            storage.pipe(f"bucket/in/{name}", b"")
        place = f"{scheme}://bucket/in"
        assert expand_remote(f"{place}/c.csv") == [f"{place}/c.csv"]
        assert expand_remote(f"{place}/*.parquet") == [f"{place}/a.parquet", f"{place}/b.parquet"]
        assert expand_remote(f"{place}/*/*.parquet") == [f"{place}/sub/d.parquet"]
        names = [f"{place}/{name}" for name in ("a.parquet", "b.parquet", "c.csv")]
        assert expand_remote(place) == expand_remote(f"{place}/") == names

    @pytest.mark.parametrize("name", ["missing", "*.missing"])
    def test_none(self, storage: Any, scheme: str, name: str) -> None:
        storage.pipe("bucket/a", b"")
        with pytest.raises(ConfigError, match="must be a file, a folder or a pattern of files"):
            expand_remote(f"{scheme}://bucket/{name}")

    @pytest.mark.parametrize(
        "url", ["https://host/a", "file:///etc/passwd", "a.jsonl", "github://x", "zip://a::s3://b"]
    )
    def test_other_storage_is_refused(self, url: str) -> None:
        for call in (open_remote, identify_remote, expand_remote):
            with pytest.raises(ConfigError, match=r"must be s3://… or gs://…"):
                call(url)

    def test_chains_are_refused(self, storage: Any, scheme: str) -> None:
        with pytest.raises(ConfigError, match="must not have '::'"):
            open_remote(f"{scheme}://bucket/a::file:///etc/passwd")

    def test_names_in_messages(self) -> None:
        assert shown_name("s3://key:secret@bucket/a b/é") == "s3://bucket/a b/é"
        assert shown_name("s3://bucket/a\n") == r"'s3://bucket/a\n'"
        assert shown_name(Path("/a/b@c")) == "/a/b@c"
        assert base_name("s3://bucket/a/b.csv") == "b.csv"
        assert base_name("s3://bucket/a/") == "a"


class TestMissingPackages:
    @pytest.mark.parametrize(("url", "package"), [("s3://b/a", "s3fs"), ("gs://b/a", "gcsfs")])
    def test_of_the_storage(self, url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ConfigError, match=f"{package} is needed for .*: pip install {package}$"
        ):
            open_remote(url)

    def test_fsspec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(ConfigError, match=r"pip install '\.\[remote\]'"):
            open_remote("s3://bucket/a")


def test_errors_of_the_storage_do_not_quote_it(
    storage: Any, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCredentialsError(Exception):
        pass

    def open_(*_args: Any, **_options: Any) -> None:
        raise NoCredentialsError("the key AKIA0000 is wrong")

    monkeypatch.setattr(type(storage), "open", open_)
    with pytest.raises(JobError) as error:
        open_remote(f"{scheme}://bucket/a")
    assert str(error.value) == f"{scheme}://bucket/a: cannot be read: NoCredentialsError"
