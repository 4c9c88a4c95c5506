"""The check of many files: its errors are those of the check of one, and a good file is met once."""

import os
from pathlib import Path

import pytest

from idefics2_engine.errors import ImageError
from idefics2_engine.images.loader import MediaConfig, check_source
from idefics2_engine.images.sources.source_check import SourceCheck

NAMES = [
    "good.png",
    "folder/good.png",
    "folder/../good.png",
    "linked/good.png",
    "link.png",
    "large.png",
    "none.png",
    "none/good.png",
    "good.png/",
    "good.png/more",
    "folder",
    "folder/..",
    ".",
    "pipe.png",
    "out.png",
    "away/secret.png",
    "../secret.png",
    "null\0.png",
    "half\ud800.png",
    "x" * 300,
    "x/" * 3000,
]
OTHERS = [
    "",
    "data:image/png;base64,AAAA",
    "http://example.org/a.png",
    "file:///etc/passwd",
    b"bytes",
    b"x" * 101,
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "folder").mkdir(parents=True)
    for name in ("good.png", "folder/good.png", "../secret.png"):
        (folder / name).write_bytes(b"x" * 100)
    (folder / "large.png").write_bytes(b"x" * 101)
    (folder / "link.png").symlink_to(folder / "good.png")
    (folder / "linked").symlink_to(folder / "folder")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


def refusal(check: object, *arguments: object) -> tuple[type[ImageError], str] | None:
    assert callable(check)
    try:
        check(*arguments)
    except ImageError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("is_rooted", [False, True])
def test_errors_are_those_of_one_image(
    root: Path, is_rooted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = MediaConfig(allowed_media_root=root if is_rooted else None, max_media_bytes=100)
    check = SourceCheck(media)
    monkeypatch.chdir(root)
    sources = [*NAMES, *(str(root / name) for name in NAMES), root / "good.png", *OTHERS]
    found = {repr(source): refusal(check, source) for source in sources}
    assert found == {repr(source): refusal(check_source, source, media) for source in sources}
    good = [source for source, error in found.items() if error is None]
    assert len(good) >= 11
    # The second look says the same
    assert found == {repr(source): refusal(check, source) for source in sources}


def test_a_good_file_is_looked_at_once(root: Path) -> None:
    check = SourceCheck(MediaConfig(allowed_media_root=root))
    good, bad = str(root / "good.png"), str(root / "none.png")
    assert refusal(check, good) is None
    assert refusal(check, bad) is not None
    (root / "good.png").rename(root / "none.png")
    assert refusal(check, good) is None
    # A bad one is looked at again
    assert refusal(check, bad) is None
