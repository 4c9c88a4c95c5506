"""Images of rows: sources for the engine's door, messages without the root, identities for keys."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.errors import ImageError, MediaNotAllowedError
from idefics2_engine.images.loader import MediaConfig, load_image
from idefics2_engine.jobs.readers.rows.row_images import RowImages
from pictures import file, noise

PNG = file(noise(3, 2), "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    (folder / "sub" / "b c.png").write_bytes(PNG)
    (tmp_path / "out.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    return folder


def test_paths_are_below_the_root_wherever_the_process_is(root: Path) -> None:
    media = MediaConfig(allowed_media_root=root)
    images = RowImages(root)
    for name in (
        "a.png",
        "sub/b c.png",
        "sub/../a.png",
        str(root / "a.png"),
        f"file://{root}/a.png",
    ):
        source = images.read(name, "images[0]").source
        assert load_image(source, media).size == (3, 2)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("no/such.png", "no/such.png"),
        ("../out.png", "out.png"),
        ("link.png", "link.png"),
        ("a\0.png", "a\0.png"),
        ("x" * 400, "x" * 117 + "…"),
        ("sub", "sub"),
    ],
)
def test_messages_name_files_by_their_place_below_the_root(
    root: Path, name: str, shown: str
) -> None:
    # A long root must not take the place of the name
    long_root = root / ("r" * 200)
    for folder in (root, long_root):
        folder.mkdir(exist_ok=True)
        source = RowImages(folder).read(name, "images[0]").source
        with pytest.raises(ImageError) as caught:
            load_image(source, MediaConfig(allowed_media_root=folder))
        assert str(caught.value).startswith(f"{shown}: ")
        assert "root" not in str(caught.value).removeprefix(shown)


@pytest.mark.parametrize("name", ["../out.png", "/etc/passwd", "link.png", "file:///etc/passwd"])
def test_files_outside_the_root_are_refused_by_the_engine(root: Path, name: str) -> None:
    source = RowImages(root).read(name, "images[0]").source
    with pytest.raises(MediaNotAllowedError, match="must lie below the allowed folder"):
        load_image(source, MediaConfig(allowed_media_root=root))


@pytest.mark.parametrize(
    "source",
    [
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        "https://example.org/a.png?key=1",
        "FTP://x/y",
        "file://other.host/a.png",
    ],
)
def test_addresses_are_left_to_the_engine(root: Path, source: str) -> None:
    assert RowImages(root).read(source, "images[0]").source == source


def test_identity_is_path_size_and_time(root: Path) -> None:
    def identity(name: Any, folder: Path = root, *, content: bool = False) -> Any:
        return RowImages(folder, content).read(name, "images[0]").identity

    path = root / "a.png"
    status = path.stat()
    assert identity("a.png") == ("file", "a.png", len(PNG), status.st_mtime_ns)
    assert identity(str(path)) == identity("a.png")
    assert identity("no.png") == ("file", "no.png")
    by_content = identity("a.png", content=True)
    os.utime(path, ns=(1, 1))
    assert identity("a.png") == ("file", "a.png", len(PNG), 1)
    # Only the content counts
    assert identity("a.png", content=True) == by_content != identity("sub/b c.png", content=True)
    path.write_bytes(PNG + b"x")
    os.utime(path, ns=(1, 1))
    assert identity("a.png") == ("file", "a.png", len(PNG) + 1, 1)
    assert identity("a.png", content=True) != by_content
    # The engine does not read a larger file
    small = RowImages(root, True, max_bytes=3).read("a.png", "").identity
    assert small == ("file", "a.png", len(PNG) + 1, 1)
    assert identity(PNG)[0] == "bytes"
    assert identity(PNG) != identity(PNG + b"x")
    assert identity("data:,a") != identity("data:,b")


def test_files_outside_the_root_are_not_looked_at(root: Path) -> None:
    for content in (False, True):
        images = RowImages(root, content)
        assert images.read("../out.png", "").identity == ("file", "../out.png")
        assert images.read("/etc/passwd", "").identity == ("file", "/etc/passwd")
    # The engine resolves links, and so does the hash of the content
    assert len(RowImages(root, True).read("link.png", "").identity) == 4


@pytest.mark.parametrize("name", ["a\0b", "\ud800.png", "x" * 5000])
def test_names_that_no_file_can_have_are_left_to_the_engine(root: Path, name: str) -> None:
    for content in (False, True):
        image = RowImages(root, content).read(name, "images[0]")
        assert image.identity == ("file", name)
        with pytest.raises(ImageError):
            load_image(image.source, MediaConfig(allowed_media_root=root))
