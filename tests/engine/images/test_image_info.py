"""What is known of an image, and what messages about it may not have."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from idefics2_engine.errors import ImageError
from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import TileRules
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.loader import MediaConfig, media_config
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.images.tiling import ImageConfig
from pictures import file, frames, noise, oriented

CONFIG = ImageConfig(70, 28, False, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def reader(media: MediaConfig) -> ImageReader:
    rules = TileRules(media.image_policy, media.max_image_pixels, CONFIG, 14, 70)
    return ImageReader(media, rules, FileCache())


def info_of(data: Any, policy: ImagePolicy = ImagePolicy.PARITY) -> ImageInfo:
    with warnings.catch_warnings(action="ignore"):
        return reader(MediaConfig(image_policy=policy)).read(data).info


@pytest.mark.parametrize(
    ("data", "info"),
    [
        (file(noise(50, 40), "PNG"), ImageInfo(50, 40, mode="RGB", format="PNG")),
        (file(noise(50, 40, "CMYK"), "JPEG"), ImageInfo(50, 40, mode="CMYK", format="JPEG")),
        (file(noise(50, 40, "RGBA"), "WebP"), ImageInfo(50, 40, mode="RGBA", format="WebP")),
        (file(noise(50, 40, "1"), "PPM"), ImageInfo(50, 40, mode="1", format="PPM")),
        (
            # The size is that of the file, and the picture is upright
            oriented(noise(60, 40), "JPEG", 6),
            ImageInfo(60, 40, mode="RGB", format="JPEG", orientation=6),
        ),
    ],
)
def test_info_of_a_file(data: bytes, info: ImageInfo) -> None:
    found = info_of(data)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.width, found.height) == (info.width, info.height)
    assert (found.mode, found.format) == (info.mode, info.format)
    assert found.orientation == info.orientation
    assert found.warnings == ()


def test_frames_that_are_not_read_are_in_the_info() -> None:
    (said,) = info_of(frames("GIF"), ImagePolicy.CORRECT).warnings
    assert "several frames" in said


def test_info_of_what_is_no_file() -> None:
    image = Image.new("L", (9, 7))
    assert info_of(image) == ImageInfo(9, 7)


def message(source: Any, **rules: Any) -> str:
    with pytest.raises(ImageError) as raised:
        reader(media_config(**rules)).read(source)
    return str(raised.value)


def test_files_are_named_within_the_allowed_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    root = tmp_path / "in"
    wanted = "cannot be read as an image: no such file or directory"
    assert message(root / "b/a.png", allowed_media_root=root) == f"b/a.png: {wanted}"
    link = tmp_path / "link"
    link.symlink_to(root)
    assert message(root / "a.png", allowed_media_root=link) == f"a.png: {wanted}"
    said = message(tmp_path / "c.png", allowed_media_root=root)
    assert said == "c.png: must lie below the allowed folder"
    for outside in (root / "../c.png", "../c.png", "a/../../c.png"):
        assert message(outside, allowed_media_root=root) == said
    assert message("./a/../b.png", allowed_media_root=Path.cwd()) == f"b.png: {wanted}"
    # Without a folder the whole name is the caller's own
    assert message(root / "a.png") == f"{root}/a.png: {wanted}"


@pytest.mark.parametrize(
    "source",
    [
        "https://user:SECRET@example.org/SECRET?key=SECRET#SECRET",
        "https://example.org?SECRET",
        "data:image/png;base64,SECRET*",
        "data:image/png;base64SECRET",
        "data:image/png,SECRET",
    ],
)
def test_messages_do_not_quote_keys_and_contents(source: str) -> None:
    assert "SECRET" not in message(source)
