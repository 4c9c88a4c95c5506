"""Loading images: every kind of source, files in a root folder, bounded data URIs, many at once."""

import base64
import io
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idefics2_engine.errors import ConfigError, ImageError, MediaNotAllowedError
from idefics2_engine.images.loader import MediaConfig, load_image, media_config
from idefics2_engine.images.parallel import read_all
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from paths import EIGHT_B
from pictures import file, frames, noise, oriented


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


SOURCES: dict[str, Callable[[Path, Image.Image], Any]] = {
    "path": lambda path, image: path,
    "str": lambda path, image: str(path),
    "bytes": lambda path, image: file(image, "PNG"),
    "bytearray": lambda path, image: bytearray(file(image, "PNG")),
    "memoryview": lambda path, image: memoryview(file(image, "PNG")),
    "data URI": lambda path, image: data_uri(file(image, "PNG")),
    "shouted data URI": lambda path, image: "DATA:;BASE64" + data_uri(file(image, "PNG"))[21:],
    "broken data URI": lambda path, image: "\r\n".join(
        data_uri(file(image, "PNG"))[at : at + 76] for at in range(0, 9999, 76)
    ),
    "Pillow": lambda path, image: image,
    "Pillow, unread": lambda path, image: Image.open(path),
    "array": lambda path, image: np.array(image),
    "array, channels first": lambda path, image: np.array(image).transpose(2, 0, 1),
    "tensor": lambda path, image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
}


@pytest.mark.parametrize("policy", ImagePolicy)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pixels(kind: str, policy: ImagePolicy, tmp_path: Path) -> None:
    image = noise(11, 17)
    path = tmp_path / "a.png"
    image.save(path)
    loaded = load_image(SOURCES[kind](path, image), MediaConfig(image_policy=policy))
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.array(loaded), np.array(image))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no image", "image bytes: must be an image file"),
        ("missing.png", "missing.png: cannot be read as an image: no such file or directory"),
        (".", r"\.: cannot be read as an image: is a directory"),
        ("", r": cannot be read as an image"),
        ("a\0b", "cannot be read as an image: no such name"),
        ("x" * 5000, r"x{117}…: cannot be read as an image: file name too long"),
        ("https://example.org/a.png", "must be a local file or a data URI, got the address"),
        ("data:image/png,abc", "data URI: must hold ';base64,'"),
        ("data:image/png;base64", "data URI: must hold ';base64,'"),
        ("data:image/png;base64,§", "data URI: must be base64"),
        ("data:image/png;base64,abc", "data URI: must be an image file"),
        ("data:image/png;base64,", "data URI: must be an image file .* got no bytes"),
        (None, "must be a path, .* got NoneType"),
        (7, "must be a path, .* got int"),
        (Image.new("RGB", (0, 3)), "must have pixels, got 0 x 3"),
    ],
)
def test_values_that_are_not_images_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_unreadable_pillow_image_is_an_error_without_pillows_message() -> None:
    whole = file(noise(64, 64), "PNG")
    broken = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(ImageError, match=r"^image: Pillow cannot read it as RGB$"):
        load_image(broken)


def test_size_of_pillow_images_is_checked_before_they_are_read() -> None:
    huge = Image.open(io.BytesIO(file(noise(20, 10), "PNG")))
    with pytest.raises(ImageError, match="image: must have at most 199 pixels, got 20 x 10"):
        load_image(huge, MediaConfig(max_image_pixels=199))


def test_pipes_sockets_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero", "/dev/null", tmp_path):
            with pytest.raises(ImageError, match="cannot be read as an image: "):
                load_image(path)


def test_files_must_be_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-not"
    for folder in (root / "sub", outside):
        folder.mkdir(parents=True)
        noise(3, 3).save(folder / "a.png")
    (root / "out.png").symlink_to(outside / "a.png")
    (root / "away").symlink_to(outside)
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    config = media_config(allowed_media_root=root)
    monkeypatch.chdir(root)
    for inside in (root / "sub/a.png", root / "in.png", "sub/a.png", root / "sub/../sub/a.png"):
        assert load_image(inside, config).size == (3, 3)
    for path in (
        outside / "a.png", root / "../root-not/a.png", "../root-not/a.png", root / "out.png",
        root / "away/a.png", "/etc/passwd", tmp_path / "missing.png", "away/missing.png",
    ):  # fmt: skip
        with pytest.raises(MediaNotAllowedError, match="must lie below the allowed folder"):
            load_image(path, config)
    assert load_image(file(noise(3, 3), "PNG"), config).size == (3, 3)


def test_sizes_of_files_are_bounded(tmp_path: Path) -> None:
    data = file(noise(20, 20), "BMP")
    (tmp_path / "a.bmp").write_bytes(data)
    sources: list[Any] = [tmp_path / "a.bmp", data, data_uri(data)]
    for source in sources:
        assert load_image(source, MediaConfig(max_media_bytes=len(data))).size == (20, 20)
        with pytest.raises(ImageError, match=f"must have at most {len(data) - 3} bytes"):
            load_image(source, MediaConfig(max_media_bytes=len(data) - 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_policy": "exact"}, "image_policy must be one of"),
        ({"max_image_pixels": 0}, "max_image_pixels must be a whole number above 0, got 0"),
        ({"max_image_pixels": True}, "max_image_pixels must be"),
        ({"max_media_bytes": 1.5}, "max_media_bytes must be a whole number above 0, got 1.5"),
        ({"media_timeout": 0}, "media_timeout must be seconds above 0, got 0"),
        ({"media_timeout": float("nan")}, "media_timeout must be"),
        ({"media_timeout": float("inf")}, "media_timeout must be"),
        ({"image_threads": 0}, "image_threads must be at least 1, got 0"),
        ({"image_threads": 2.0}, "image_threads must be at least 1"),
        ({"allowed_media_hosts": "a.example"}, "must be a list of names, got 'a.example'"),
        ({"allowed_media_hosts": ["https://a.example/"]}, "must be names of hosts, got 'https"),
        ({"allowed_media_hosts": [""]}, "must be names of hosts, got ''"),
        ({"allowed_media_root": "no/such"}, "allowed_media_root must be a folder, got 'no/such'"),
    ],
)
def test_invalid_media_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        media_config(**settings)


def test_items_are_read_in_parallel_and_in_order() -> None:
    together = threading.Barrier(4)

    def read(index: int) -> int:
        # This passes only if four readers run at a time
        together.wait(5)
        return index * index

    assert read_all(read, [object() for _ in range(8)], 4) == [n * n for n in range(8)]


def test_pillows_block_cache_grows_and_never_shrinks() -> None:
    memory = Image.core  # type: ignore[attr-defined]
    before = memory.get_blocks_max()
    try:
        memory.set_blocks_max(0)
        read_all(lambda index: index, [object()], 3)
        assert memory.get_blocks_max() == 6
        memory.set_blocks_max(50)
        read_all(lambda index: index, [object()], 3)
        assert memory.get_blocks_max() == 50
    finally:
        memory.set_blocks_max(before)


def test_repeated_object_is_read_once() -> None:
    count: list[int] = []
    one, other = object(), object()
    for threads in (1, 4):
        got = read_all(lambda index: count.append(index) or index, [one, other, one, one], threads)  # type: ignore[func-returns-value]
        assert got == [0, 1, 0, 0]
    assert sorted(count) == [0, 0, 1, 1]
    assert read_all(lambda index: index, [], 4) == []


def test_first_error_in_order_ends_the_reading() -> None:
    begun: list[int] = []

    def read(index: int) -> int:
        begun.append(index)
        if index in (3, 5):
            raise ValueError(index)
        if index > 5:
            time.sleep(0.01)
        return index

    for threads in (1, 2):
        begun.clear()
        with pytest.raises(ValueError, match=r"^3$"):
            read_all(read, [object() for _ in range(1000)], threads)
        assert len(begun) < 1000


@pytest.mark.parametrize("threads", [1, 3])
def test_prompts_read_their_images_in_threads(threads: int) -> None:
    model = ModelConfig.load(EIGHT_B)
    media = MediaConfig(image_threads=threads)
    processor = Processor.load(EIGHT_B, model, split=True, media=media)
    images: list[list[Any]] = [
        [noise(30 + n, 20), file(noise(40, 30 + n), "PNG"), noise(9, 9)][: n % 4] for n in range(8)
    ]
    drafts = [processor.draft_prompt("<image>" * len(own), own) for own in images]
    for got, own in zip(processor.finish(drafts), images, strict=True):
        wanted = [tile for image in own for tile in processor.prompt("<image>", [image]).tiles]
        assert len(got.tiles) == len(wanted) == 5 * len(own)
        for tile, alone in zip(got.tiles, wanted, strict=True):
            np.testing.assert_array_equal(tile.pixels, alone.pixels)
    lazy = Image.open(io.BytesIO(file(noise(600, 600), "PNG")))
    (first,) = processor.finish([processor.draft_prompt("<image>" * 9, [lazy] * 9)])
    assert len(first.tiles) == 45


@pytest.mark.parametrize("threads", [1, 3])
def test_error_names_image_and_prompt(threads: int) -> None:
    media = MediaConfig(image_threads=threads)
    processor = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B), media=media)
    fine = noise(2, 2)
    drafts = [
        processor.draft_prompt("<image>" * 2, [fine, fine]),
        processor.draft_prompt("<image>" * 2, [fine, b"bad"]),
        processor.draft_prompt("<image>", ["https://a.example/"]),
    ]
    with pytest.raises(ImageError, match=r"^images\[1\] of prompts\[1\]: image bytes: must be"):
        processor.finish(drafts)
    with pytest.raises(MediaNotAllowedError, match=r"^images\[0\] of prompts\[1\]: image: must"):
        processor.finish([drafts[0], drafts[2]])
    with pytest.raises(ImageError, match=r"^images\[1\]: image bytes: must be"):
        processor.finish([drafts[1]])
    with pytest.raises(ImageError, match=r"^images\[1\] of messages\[1\]: image bytes: must be"):
        processor.finish(drafts, "messages")
    text, bad = processor.draft_prompt("a"), processor.draft_prompt("<image>", [b"bad"])
    with pytest.raises(ImageError, match=r"^images\[0\] of messages\[1\]: image bytes: must be"):
        processor.finish([text, bad], "messages")
    with pytest.raises(ImageError, match=r"^image bytes: must be"):
        processor.prompt("<image>", [b"bad"])


def test_policy_reaches_the_tiles() -> None:
    model = ModelConfig.load(EIGHT_B)
    for policy in ImagePolicy:
        media = MediaConfig(image_policy=policy)
        processor = Processor.load(EIGHT_B, model, split=False, media=media)
        if policy is ImagePolicy.STRICT:
            with pytest.raises(ImageError, match="strict' refuses EXIF orientation 6"):
                processor.prompt("<image>", [oriented(noise(400, 500), "PNG", 6)])
            with pytest.raises(ImageError, match="strict' refuses several frames"):
                processor.prompt("<image>", [frames("GIF")])
            continue
        clear = Image.new("RGBA", (400, 500), (0, 0, 0, 0))
        (tile,) = processor.prompt("<image>", [clear]).tiles
        assert (tile.pixels == (0 if policy is ImagePolicy.PARITY else 255)).all()
