"""Folders of images: which files are rows, their order, and what leads out of the folder."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.job_errors import JobError
from idefics2_engine.jobs.job_row import RowError
from idefics2_engine.jobs.readers.formats.image_folder import ImageFolderSource
from idefics2_engine.jobs.readers.source import RawRow

OPTIONS = SimpleNamespace(media_root=None)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"never opened")
    return folder


def ids(*paths: Path) -> list[str | None]:
    rows = list(ImageFolderSource(paths, OPTIONS))
    for row in rows:
        assert row.error is None
        assert row.columns == {"images": [row.default_id]}
    return [row.default_id for row in rows]


def test_one_row_a_file_in_name_order(tmp_path: Path) -> None:
    names = ["b.JPG", "a/c.png", "a/b/c.tiff", "a-1.webp", "a.gif", "é ü.bmp", "B.ppm", "z.heic"]
    make(tmp_path / "pictures", *names)
    source = ImageFolderSource((tmp_path / "pictures",), OPTIONS)
    rows = list(source)
    assert rows == list(source)
    assert [row.default_id for row in rows] == [
        "B.ppm",
        "a/b/c.tiff",
        "a/c.png",
        "a-1.webp",
        "a.gif",
        "b.JPG",
        "z.heic",
        "é ü.bmp",
    ]
    assert rows[1] == RawRow("pictures/a/b/c.tiff", {"images": ["a/b/c.tiff"]}, None, "a/b/c.tiff")
    assert source.form == "columns"
    assert source.files == (tmp_path / "pictures",)


def test_other_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    names = ["a.txt", "b.json", "Thumbs.db", "png", "c.png.txt", "d.svg"]
    make(tmp_path, "x.png", ".hidden.png", "._x.png", ".git/y.png", "a/.b/c.png", *names)
    (tmp_path / "folder.png").mkdir()
    assert ids(tmp_path) == ["x.png"]


def test_empty_folder_has_no_rows(tmp_path: Path) -> None:
    assert ids(tmp_path) == []


def test_pipes_and_devices_are_rows_that_nobody_opens(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mknod(tmp_path / "b.png", 0o600 | 0o020000, os.makedev(1, 3))
    assert ids(tmp_path) == ["a.png", "b.png"]


def test_links(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "x.png", "sub/y.png")
    make(tmp_path / "out", "secret.png", "more/z.png")
    make(tmp_path / "inside", "v.png")
    (folder / "a.png").symlink_to("x.png")
    (folder / "b.png").symlink_to("../out/secret.png")
    (folder / "c.png").symlink_to(tmp_path / "inside/v.png")
    (folder / "d.png").symlink_to("no such file")
    (folder / "e.png").symlink_to("e.png")
    (folder / "f.png").symlink_to("sub")
    (folder / "g").symlink_to("../out")
    (folder / "h").symlink_to(".")
    (folder / "i.png").symlink_to(tmp_path / "out")
    rows = list(ImageFolderSource((folder,), OPTIONS))
    error = RowError(
        "media_not_allowed",
        "media",
        "images[0]: must be in the folder, got a link that leads out of it",
    )
    assert {row.default_id: row.error for row in rows} == {
        "a.png": None,
        "b.png": error,
        "c.png": error,
        "d.png": None,
        "e.png": None,
        "sub/y.png": None,
        "x.png": None,
    }
    assert [row.columns for row in rows if row.error] == [None, None]
    # A folder may be named by a link
    (tmp_path / "link").symlink_to("in")
    assert len(list(ImageFolderSource((tmp_path / "link",), OPTIONS))) == len(rows)


def test_paths_are_relative_to_the_media_root(tmp_path: Path) -> None:
    folder = make(tmp_path / "root/a", "x.png", "b/y.png")
    (tmp_path / "link").symlink_to("root")
    for root in (tmp_path / "root", tmp_path / "link"):
        rows = list(ImageFolderSource((folder,), SimpleNamespace(media_root=root)))
        assert [(row.default_id, row.columns) for row in rows] == [
            ("b/y.png", {"images": ["a/b/y.png"]}),
            ("x.png", {"images": ["a/x.png"]}),
        ]
    make(tmp_path / "rooter", "x.png")
    with pytest.raises(ConfigError, match="rooter: a folder of images must be in the media root"):
        ImageFolderSource((tmp_path / "rooter",), SimpleNamespace(media_root=tmp_path / "root"))


def test_a_name_is_never_an_address(tmp_path: Path) -> None:
    make(tmp_path, "data:image;base64,AAAA.png", "https:/a.png")
    rows = list(ImageFolderSource((tmp_path,), OPTIONS))
    assert [row.columns for row in rows] == [
        {"images": ["./data:image;base64,AAAA.png"]},
        {"images": ["./https:/a.png"]},
    ]


def test_files_and_folders(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b/c.png", "image without a suffix")
    paths = (tmp_path / "b", tmp_path / "image without a suffix", tmp_path / "a.png")
    assert ids(*paths) == ["c.png", "image without a suffix", "a.png"]


@pytest.mark.parametrize("name", ["missing", "s3://bucket/images"])
def test_other_names(name: str, tmp_path: Path) -> None:
    path = name if ":" in name else tmp_path / name
    with pytest.raises(ConfigError, match=f"{name}: must be a local folder of images, or an image"):
        ImageFolderSource((path,), OPTIONS)


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "a/b.png", "c/d.png")
    rows = iter(ImageFolderSource((tmp_path,), OPTIONS))
    assert next(rows).default_id == "a/b.png"
    (tmp_path / "c/d.png").unlink()
    (tmp_path / "c").rmdir()
    with pytest.raises(JobError, match="/c: cannot be read: No such file or directory"):
        next(rows)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).touch()
    (tmp_path / "a\n.png").touch()
    first, last = ImageFolderSource((tmp_path,), OPTIONS)
    assert first.default_id == "a\n.png"
    assert first.place.isprintable()
    assert last.columns == {"images": ["\udcff.png"]}
    assert last.place.isprintable()
