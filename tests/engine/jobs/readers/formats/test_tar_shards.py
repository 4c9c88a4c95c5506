"""Tar shards: what WebDataset writes, members that are refused, and damage at any place."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webdataset
import zstandard

from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.readers.formats import tar_shards
from idefics2_engine.jobs.readers.formats.tar_shards import TarShardSource
from idefics2_engine.jobs.readers.source import RawRow

OPTIONS = SimpleNamespace()
Entry = tuple[str, bytes] | tuple[tarfile.TarInfo, bytes]


def tar_bytes(entries: Sequence[Entry], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def rows_of(path: Path, content: bytes, options: object = OPTIONS) -> list[RawRow]:
    path.write_bytes(content)
    return list(TarShardSource((path,), options))


def columns_of(path: Path, entries: Sequence[Entry], options: object = OPTIONS) -> Any:
    (row,) = rows_of(path, tar_bytes(entries), options)
    assert row.error is None
    return row.columns


def error_of(path: Path, entries: Sequence[Entry], options: object = OPTIONS) -> RowError:
    """Return the error of the first row, which costs the rows around it nothing."""
    before, after = ("0.png", b"before"), ("z.png", b"after")
    rows = rows_of(path, tar_bytes([before, *entries, after]), options)
    assert rows[0].columns == {"images": [b"before"]}
    assert rows[-1].columns == {"images": [b"after"]}
    (bad,) = rows[1:-1]
    assert bad.columns is None
    assert bad.error is not None
    assert len(bad.error.message) <= 500
    return bad.error


def rows_until_damage(path: Path, content: bytes) -> tuple[list[RawRow], str]:
    path.write_bytes(content)
    rows: list[RawRow] = []
    with pytest.raises(JobError) as error:
        rows.extend(TarShardSource((path,), OPTIONS))
    return rows, str(error.value)


def test_what_webdataset_writes(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.tar"
    samples = [
        {
            "__key__": f"sub/{number:03}",
            "png": b"png%d" % number,
            "txt": f"What is é in {number}?",
            "json": {"title": "a", "n": number},
            "cls": number,
            "right.jpg": b"right",
            "bin": b"\xff\x00",
        }
        for number in range(3)
    ]
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    source = TarShardSource((path,), OPTIONS)
    rows = list(source)
    assert rows == list(source)
    assert source.form == "columns"
    assert source.files == (path,)
    for number, row in enumerate(rows):
        assert row == RawRow(
            f"shard-0.tar/sub/{number:03}",
            {
                "prompt": f"What is é in {number}?",
                "title": "a",
                "n": number,
                "cls": str(number),
                "bin": b"\xff\x00",
                "images": [b"png%d" % number, b"right"],
            },
            None,
            f"shard-0.tar/sub/{number:03}",
        )
    assert len(rows) == 3


class TestRows:
    def test_neighbors_with_one_name_are_a_row(self, tmp_path: Path) -> None:
        names = ["a.png", "a.txt", "b.png", "a.jpg", "x/a.png", "x/a.txt", "x.y/a.png", "./c.png"]
        rows = rows_of(tmp_path / "s.tar", tar_bytes([(name, b"-") for name in names]))
        assert [row.default_id for row in rows] == [
            "s.tar/a",
            "s.tar/b",
            "s.tar/a",
            "s.tar/x/a",
            "s.tar/x.y/a",
            "s.tar/c",
        ]

    def test_names_without_a_key_or_an_extension_are_no_rows(self, tmp_path: Path) -> None:
        entries: list[Entry] = [("README", b"-"), (".hidden.png", b"-"), ("a/.DS_Store", b"-")]
        entries += [(special("dir.png", tarfile.DIRTYPE), b""), ("x.png", b"1")]
        assert columns_of(tmp_path / "s.tar", entries) == {"images": [b"1"]}

    def test_images_are_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        entries = [("a.2.png", b"2"), ("a.png", b"3"), ("a.1.JPG", b"1"), ("a.txt", b"?")]
        assert columns_of(tmp_path / "s.tar", entries) == {
            "prompt": "?",
            "images": [b"1", b"2", b"3"],
        }

    def test_images_may_be_paths_of_the_json(self, tmp_path: Path) -> None:
        entries = [("a.json", b'{"images": ["a.png"], "image": "b.png"}')]
        assert columns_of(tmp_path / "s.tar", entries) == {"images": ["a.png"], "image": "b.png"}

    def test_names_lead_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(b"secret")
        entries = [("../secret.png", b"1"), ("/etc/passwd.png", b"2"), ("a\n\udcff.png", b"3")]
        rows = rows_of(tmp_path / "s.tar", tar_bytes(entries))
        assert [row.columns for row in rows] == [{"images": [b"%d" % n]} for n in (1, 2, 3)]
        assert [row.default_id for row in rows] == [
            "s.tar/../secret",
            "s.tar//etc/passwd",
            "s.tar/a\n\udcff",
        ]
        assert all(row.place.isprintable() for row in rows)
        assert os.listdir(tmp_path) != []
        assert {path.name for path in tmp_path.iterdir()} == {"s.tar", "secret.png"}

    @pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names(self, tmp_path: Path, format_: int) -> None:
        name = "é" * 100 + "/" + "x" * 300
        rows = rows_of(tmp_path / "s.tar", tar_bytes([(f"{name}.png", b"1")], format=format_))
        assert [row.default_id for row in rows] == [f"s.tar/{name}"]

    def test_empty_archive(self, tmp_path: Path) -> None:
        assert rows_of(tmp_path / "s.tar", tar_bytes([])) == []

    @pytest.mark.parametrize(
        ("name", "pack"),
        [("s.tar.gz", gzip.compress), ("s.tgz", gzip.compress), ("s.tar.zst", zstandard.compress)],
    )
    def test_packed(self, tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
        (row,) = rows_of(tmp_path / name, pack(tar_bytes([("a.png", b"1")])))
        assert row == RawRow(f"{name}/a", {"images": [b"1"]}, None, f"{name}/a")

    def test_memory_does_not_grow_with_members(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archives: list[Any] = []
        open_ = tarfile.open

        def opened(*args: Any, **options: Any) -> Any:
            archives.append(open_(*args, **options))
            return archives[-1]

        path = tmp_path / "s.tar"
        path.write_bytes(tar_bytes([(f"{number}.png", b"") for number in range(100)]))
        monkeypatch.setattr(tarfile, "open", opened)
        for _ in TarShardSource((path,), OPTIONS):
            assert len(archives[0].members) <= 1


class TestBadRows:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            (tarfile.SYMTYPE, "a symbolic link"),
            (tarfile.LNKTYPE, "a link"),
            (tarfile.FIFOTYPE, "a pipe"),
            (tarfile.CHRTYPE, "a device"),
            (tarfile.BLKTYPE, "a device"),
        ],
    )
    def test_members_that_are_no_files(self, tmp_path: Path, kind: bytes, name: str) -> None:
        for extension, code in (("png", "media_not_allowed"), ("txt", "schema")):
            member = special(f"a.{extension}", kind, "/etc/passwd")
            error = error_of(tmp_path / "s.tar", [(member, b""), ("a.jpg", b"1")])
            assert error.code == code
            assert error.message == (
                f"member '.{extension}' must be a file, got a link, a pipe or a device"
            )

    def test_sparse_members(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "5"}
        entry = (info, b"123")
        path = tmp_path / "s.tar"
        rows = rows_of(path, tar_bytes([entry, ("b.png", b"1")], format=tarfile.PAX_FORMAT))
        assert [row.error is not None for row in rows] == [True, False]

    def test_bytes_of_a_row_have_a_limit(self, tmp_path: Path) -> None:
        options = SimpleNamespace(max_media_bytes=1000)
        entries = [("a.1.png", bytes(400)), ("a.2.png", bytes(600))]
        assert columns_of(tmp_path / "s.tar", entries, options)["images"] == [
            bytes(400),
            bytes(600),
        ]
        entries[1] = ("a.2.png", bytes(601))
        error = error_of(tmp_path / "s.tar", [*entries, ("a.json", b"{")], options)
        assert error == RowError(
            "image", "media", "the row must have at most 1000 bytes, got 1001 with member '.2.png'"
        )

    def test_a_bomb_is_not_unpacked_into_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = []
        extract = tarfile.TarFile.extractfile

        def counted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
            read.append(member.name)
            return extract(archive, member)

        monkeypatch.setattr(tarfile.TarFile, "extractfile", counted)
        content = gzip.compress(
            tar_bytes([("a.png", bytes(50 << 20)), ("b.png", b"1")]), compresslevel=1
        )
        options = SimpleNamespace(max_media_bytes=1 << 20)
        bad, good = rows_of(tmp_path / "s.tar.gz", content, options)
        assert bad.error is not None
        assert good.columns == {"images": [b"1"]}
        assert read == ["b.png"]

    def test_members_of_a_row_have_a_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tar_shards, "MOST_MEMBERS", 3)
        entries = [(f"a.{number}.png", b"") for number in range(4)]
        assert len(columns_of(tmp_path / "s.tar", entries[:3])["images"]) == 3
        assert error_of(tmp_path / "s.tar", entries).code == "schema"

    @pytest.mark.parametrize(
        ("entries", "code", "message"),
        [
            ([("a.txt", b"\xff")], "encoding", "member '.txt' must be UTF-8"),
            ([("a.json", b"\xff")], "encoding", "must be UTF-8"),
            ([("a.json", b"{")], "json", "must be JSON"),
            ([("a.json", b"[" * 10_000)], "json", "levels"),
            ([("a.json", b"[1]")], "schema", "must be a JSON object"),
            ([("a.json", b'{"x": 1, "x": 1}')], "duplicate_key", "'x'"),
            ([("a.json", b'{"x": NaN}')], "json", "finite"),
            ([("a.json", b'{"prompt": 1}'), ("a.txt", b"")], "duplicate_key", "'prompt' once"),
            ([("a.json", b'{"cls": 1}'), ("a.cls", b"1")], "duplicate_key", "'cls' once"),
            ([("a.png", b""), ("a.PNG", b"")], "duplicate_key", "'png' once"),
            ([("a.png", b""), ("a.json", b'{"image": "b"}')], "duplicate_key", "in 'image', got"),
            ([("a.json", b'{"images": []}'), ("a.png", b"")], "duplicate_key", "in 'images', got"),
        ],
    )
    def test_bad_members(
        self, tmp_path: Path, entries: list[Entry], code: str, message: str
    ) -> None:
        error = error_of(tmp_path / "s.tar", entries)
        assert error.code == code
        assert message in error.message

    def test_image_column_chooses_the_members(self, tmp_path: Path) -> None:
        entries = [("a.png", b"1"), ("a.json", b'{"image": "b"}')]
        options = SimpleNamespace(image_column="images")
        assert columns_of(tmp_path / "s.tar", entries, options) == {"image": "b", "images": [b"1"]}


class TestDamage:
    ENTRIES = tuple((f"{number}.png", b"%d" % number * 600) for number in range(4))

    def whole(self) -> bytes:
        return tar_bytes(self.ENTRIES)

    def test_every_cut_is_noticed(self, tmp_path: Path) -> None:
        content = self.whole()
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512
        for size in {*range(0, end + 1, 256), *range(1, end, 701)}:
            rows, message = rows_until_damage(tmp_path / "s.tar", content[:size])
            assert "s.tar: cannot be read at byte " in message
            # A row is yielded once the next one began
            num_headers = sum(size >= member * 1536 + 512 for member in range(4))
            assert [row.columns for row in rows] == [
                {"images": [image]} for _, image in self.ENTRIES[: max(num_headers - 1, 0)]
            ]
        assert len(rows_of(tmp_path / "s.tar", content[: end + 512])) == 4

    @pytest.mark.parametrize("member", [0, 1, 3])
    def test_a_flipped_bit_in_a_header(self, tmp_path: Path, member: int) -> None:
        content = bytearray(self.whole())
        for offset in (0, 130, 150, 156, 300):
            damaged = bytearray(content)
            damaged[member * 1536 + offset] ^= 1
            rows, message = rows_until_damage(tmp_path / "s.tar", bytes(damaged))
            assert [row.columns for row in rows] == [
                {"images": [image]} for _, image in self.ENTRIES[: max(member - 1, 0)]
            ]
            assert message == f"{tmp_path}/s.tar: cannot be read at byte {member * 1536}: ReadError"

    def test_data_behind_the_end(self, tmp_path: Path) -> None:
        rows, message = rows_until_damage(tmp_path / "s.tar", self.whole() + self.whole())
        assert len(rows) == 3
        assert "cannot be read at byte 6144: ReadError" in message
        assert len(rows_of(tmp_path / "s.tar", self.whole() + bytes(3 << 20))) == 4

    @pytest.mark.parametrize("size", [-1, -512, -1536, -(1 << 40)])
    def test_negative_sizes(self, tmp_path: Path, size: int) -> None:
        info = tarfile.TarInfo("a.png")
        info.size = size
        record = f" size={size}\n"
        # With its own two digits
        record = f"{len(record) + 2}{record}"
        for content in (info.tobuf(tarfile.GNU_FORMAT), self.pax(record.encode())):
            rows, message = rows_until_damage(tmp_path / "s.tar", content + bytes(1024))
            assert rows == []
            assert message.endswith("cannot be read at byte 0: ReadError")

    def pax(self, records: bytes) -> bytes:
        info = tarfile.TarInfo("././@PaxHeader")
        info.type, info.size = tarfile.XHDTYPE, len(records)
        padded = records.ljust(-(-len(records) // 512) * 512, b"\0")
        return info.tobuf() + padded + tar_bytes([("a.png", b"1")])

    @pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
    @pytest.mark.parametrize("size", [10 << 20, -512])
    def test_headers_of_bad_sizes_are_not_read(
        self, tmp_path: Path, kind: bytes, size: int
    ) -> None:
        info = tarfile.TarInfo("a")
        info.type, info.size = kind, size
        content = info.tobuf(tarfile.GNU_FORMAT) + bytes(max(size, 0)) + self.whole()
        rows, message = rows_until_damage(tmp_path / "s.tar.gz", gzip.compress(content, 1))
        assert rows == []
        assert message.endswith("cannot be read at byte 0: ReadError")

    def test_old_sparse_members_end(self, tmp_path: Path) -> None:
        # Such a header has extensions, whose number has no bound
        content = special("a.png", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)
        rows, message = rows_until_damage(tmp_path / "s.tar", content + self.whole())
        assert rows == []
        assert message.endswith("cannot be read at byte 0: ReadError")

    @pytest.mark.parametrize(
        ("name", "pack"), [("s.tar.gz", gzip.compress), ("s.tar.zst", zstandard.compress)]
    )
    def test_cut_when_packed(
        self, tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
    ) -> None:
        entries = [(f"{number}.png", os.urandom(5000)) for number in range(200)]
        packed = pack(tar_bytes(entries))
        for size in (0, 5, len(packed) // 2, len(packed) - 4):
            rows, message = rows_until_damage(tmp_path / name, packed[:size])
            assert f"{name}: cannot be read at byte " in message
            assert [row.columns for row in rows] == [
                {"images": [image]} for _, image in entries[: len(rows)]
            ]

    def test_missing_folder_and_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.tar")
        (tmp_path / "folder.tar").mkdir()
        for name, message in (
            ("missing.tar", "No such file"),
            ("pipe.tar", "must be a file that can be read twice"),
            ("folder.tar", "must be a file that can be read twice"),
        ):
            with pytest.raises(JobError, match=f"{name}: .*{message}"):
                list(TarShardSource((tmp_path / name,), OPTIONS))

    def test_text_is_no_archive(self, tmp_path: Path) -> None:
        rows, message = rows_until_damage(tmp_path / "s.tar", b"no archive" * 100)
        assert rows == []
        assert message == f"{tmp_path}/s.tar: cannot be read at byte 0: ReadError"
