"""Headers of images: the size that decoding gives, and its errors, for files of every kind."""

import base64
import os
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from idefics2_engine.errors import ImageError
from idefics2_engine.images.header import ImageHeader, read_header
from idefics2_engine.images.loader import ImageSource, MediaConfig, check_source, load_image
from idefics2_engine.images.policy import ImagePolicy
from pictures import FORMATS, MODES, file, frames, noise, oriented, png_file, sixteen_bits

# What only the pixels can show
AT_DECODING = ("it is damaged or cut off", "must be read in at most", "floats must lie in")


@cache
def whole_files() -> dict[str, bytes]:
    made = {kind: file(noise(50, 30), kind) for kind in FORMATS}
    for kind in ("JPEG", "PNG", "WebP", "TIFF"):
        for turn in range(1, 9):
            made[f"{kind} turned {turn}"] = oriented(noise(50, 30), kind, turn)
    for mode in MODES:
        for kind in ("PNG", "TIFF", "BMP", "GIF", "WebP", "JPEG"):
            try:
                made[f"{kind} in {mode}"] = file(noise(20, 10, mode), kind)
            except (OSError, KeyError, ValueError, AttributeError):
                continue
    return made | {
        **{f"{kind} of frames": frames(kind) for kind in ("PNG", "GIF", "WebP", "TIFF")},
        "16 bits": sixteen_bits(),
        "deflated TIFF, turned": oriented_tiff(6, compression="tiff_deflate"),
        "JPEG in TIFF, turned": oriented_tiff(8, compression="jpeg"),
        "plain PPM": b"P3 2 3 255\n" + b"1 2 3 " * 6,
        "one pixel": file(noise(1, 1), "PNG"),
        "a line": file(noise(1, 1000), "JPEG"),
        "EXIF behind the pixels": late_chunk(b"eXIf", exif(6)),
        "EXIF in a late text": late_chunk(b"tEXt", raw_profile(exif(8))),
        "XMP behind the pixels": late_chunk(b"iTXt", xmp(5)),
        "a date behind the pixels": late_chunk(b"tEXt", b"date:create\x002026-01-01"),
        "XMP in a JPEG": file(noise(50, 30), "JPEG", xmp=XMP % 6),
        "XMP in a TIFF": file(noise(50, 30), "TIFF", tiffinfo={700: XMP % 6}),
    }


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def exif(turn: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = turn
    return made.tobytes().removeprefix(b"Exif\0\0")


def raw_profile(data: bytes) -> bytes:
    return b"Raw profile type exif\0\nexif\n%d\n" % len(data) + (b"Exif\0\0" + data).hex().encode()


def xmp(turn: int) -> bytes:
    return b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % turn


def oriented_tiff(turn: int, **options: Any) -> bytes:
    made = Image.Exif()
    made[0x0112] = turn
    return file(noise(50, 30), "TIFF", exif=made, **options)


def late_chunk(name: bytes, body: bytes) -> bytes:
    whole = file(noise(50, 30), "PNG")
    end = whole.rindex(b"IEND") - 4
    chunk = len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)
    return whole[:end] + chunk + whole[end:]


def outcome(read: Callable[[], Any]) -> Any:
    """Return what ``read`` returns, or its error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has several frames")
        try:
            return read()
        except ImageError as error:
            return error


def header_after_comparison(source: ImageSource, config: MediaConfig) -> ImageHeader | ImageError:
    """Compare the header with what decoding gives, and return it or its error."""
    decoded = outcome(lambda: load_image(source, config))
    header = outcome(lambda: read_header(source, config))
    if isinstance(header, ImageError):
        assert isinstance(decoded, ImageError), f"{header}, but it is decoded"
        assert (type(header), str(header)) == (type(decoded), str(decoded))
        return header
    assert isinstance(header, ImageHeader)
    if isinstance(decoded, ImageError):
        assert any(words in str(decoded) for words in AT_DECODING), decoded
    else:
        assert header.size == decoded.size
    return header


@pytest.mark.parametrize("policy", ImagePolicy)
def test_headers_have_the_size_of_decoding(policy: ImagePolicy) -> None:
    refused = 0
    for data in whole_files().values():
        refused += isinstance(
            header_after_comparison(data, MediaConfig(image_policy=policy)), ImageError
        )
    assert (refused > 0) == (policy is ImagePolicy.STRICT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF"])
def test_size_is_that_of_the_upright_image(kind: str) -> None:
    for turn in range(1, 9):
        header = read_header(oriented(noise(50, 30), kind, turn), MediaConfig())
        assert header is not None
        assert header.size == ((30, 50) if turn > 4 else (50, 30))


def test_equal_files_have_equal_fingerprints(tmp_path: Path) -> None:
    data = file(noise(9, 5), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources: list[ImageSource] = [data, tmp_path / "a.png", {"bytes": data, "path": None}, uri]
    headers = [read_header(source, MediaConfig()) for source in sources]
    assert headers == [headers[0]] * 4
    assert read_header(file(noise(9, 6), "PNG"), MediaConfig()) != headers[0]


def test_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def load(self: Image.Image) -> None:
        decoded.append(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for name in ("JPEG turned 6", "PNG turned 6", "a date behind the pixels", *FORMATS):
        read_header(whole_files()[name], MediaConfig())
    assert not decoded
    # The exception is an orientation that may be known only behind the pixels
    read_header(whole_files()["EXIF behind the pixels"], MediaConfig())
    assert decoded


def damaged() -> Iterator[bytes]:
    rng = random.Random(0)
    names = sorted(name for name in whole_files() if " in " not in name or "XMP" in name)
    for number in range(12 * len(names)):
        data = bytearray(whole_files()[names[number % len(names)]])
        if number % 4 == 0:
            yield bytes(data[: rng.randrange(len(data))])
        for _ in range(rng.choice((1, 1, 4))):
            at = rng.randrange(min(200, len(data)) if rng.random() < 0.7 else len(data))
            data[at] ^= rng.randrange(1, 256)
        yield bytes(data)


def test_headers_of_damaged_files_never_contradict_decoding() -> None:
    found = {True: 0, False: 0}
    for data in damaged():
        for policy in (ImagePolicy.PARITY, ImagePolicy.STRICT):
            error = header_after_comparison(
                data, MediaConfig(image_policy=policy, max_image_pixels=10**6)
            )
            found[isinstance(error, ImageError)] += 1
    assert min(found.values()) > 100


def bad_files() -> dict[str, bytes]:
    png = file(noise(64, 48), "PNG")
    return {
        "empty": b"",
        "text": b"hello",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "header only": png[:33],
        "too many pixels": file(noise(64, 49), "PNG"),
        "a huge header": png_file(65535, 65535, b""),
        "a huge WebP": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(8),
        "no pixels": png_file(0, 0, b""),
        "too many bytes": png + bytes(1 << 20),
        "many numbers": b"P3 3000 1000 255\n",
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_have_the_same_error_as_bytes_and_as_a_file(name: str, tmp_path: Path) -> None:
    data = bad_files()[name]
    config = MediaConfig(max_image_pixels=64 * 48, max_media_bytes=1 << 20)
    header_after_comparison(data, config)
    (tmp_path / "a.png").write_bytes(data)
    header_after_comparison(tmp_path / "a.png", config)


def bad_sources(folder: Path) -> dict[str, Any]:
    root = folder / "root"
    root.mkdir()
    outside = folder / "outside.png"
    outside.write_bytes(file(noise(9, 5), "PNG"))
    (root / "good.png").write_bytes(outside.read_bytes())
    (root / "large.png").write_bytes(file(noise(200, 200), "PNG"))
    (root / "link.png").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return {
        "missing": str(root / "none.png"),
        "outside": str(outside),
        "dots": str(root / ".." / "outside.png"),
        "a link out": root / "link.png",
        "a loop": root / "loop.png",
        "a pipe": str(root / "pipe.png"),
        "a device": "/dev/zero",
        "a folder": str(root),
        "a null character": "a\0b.png",
        "an endless name": "a" * 5000,
        "too large": str(root / "large.png"),
        "a file URL": (root / "none.png").as_uri(),
        "a file URL of another host": "file://host/a.png",
        "a path in a dict": {"path": str(outside), "bytes": None},
        "an empty dict": {},
        "a number": 7,
        "none": None,
        "no base64": "data:image/png;base64,???",
        "no data": "data:image/png,abc",
        "a URL": "https://example.org/a.png",
        "another host": "https://elsewhere.example/a.png?key=secret",
        "no TLS": "http://allowed.example/a.png",
        "a password": "https://me:secret@allowed.example/a.png",
    }


@pytest.mark.parametrize("hosts", [(), ("allowed.example",)])
def test_bad_sources_have_the_errors_of_decoding(hosts: tuple[str, ...], tmp_path: Path) -> None:
    sources = bad_sources(tmp_path)
    config = MediaConfig(
        allowed_media_root=tmp_path / "root", max_media_bytes=10_000, allowed_media_hosts=hosts
    )
    for name, source in sources.items():
        error = header_after_comparison(source, config)
        assert isinstance(error, ImageError), name
        # The content of a data URI is not looked at
        if name not in ("no base64", "no data"):
            with pytest.raises(type(error)) as raised:
                check_source(source, config)
            assert str(raised.value) == str(error)
    check_source(str(tmp_path / "root" / "good.png"), config)


def test_an_allowed_address_is_not_contacted() -> None:
    config = MediaConfig(allowed_media_hosts=("allowed.example",))
    assert read_header("https://allowed.example/a.png", config) is None
    check_source("https://allowed.example/a.png", config)


@pytest.mark.parametrize(
    "source", [noise(7, 5), np.zeros((5, 7, 3), np.uint8), Image.new("L", (7, 5))]
)
def test_pixels_in_memory_have_a_header(source: ImageSource) -> None:
    header = read_header(source, MediaConfig())
    assert header is not None
    assert header.size == (7, 5)
