"""Damaged, forged, oversized and foreign files: each gives an image or an ImageError."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import traceback
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_engine.errors import ImageError
from idefics2_engine.images.decoder import decode
from idefics2_engine.images.loader import MAX_PIXELS
from idefics2_engine.images.parallel import read_all
from idefics2_engine.images.policy import ImagePolicy
from pictures import FORMATS, file, frames, noise, png_file

PARITY, CORRECT, STRICT = ImagePolicy
OURS = ("cannot be read as", "must ", "image_policy='strict' refuses")


@cache
def samples() -> dict[str, bytes]:
    """Return a file of each format, and several for formats with several encodings."""
    picture = noise(64, 48).resize((96, 72))
    made = {kind: file(picture, kind) for kind in FORMATS}
    return made | {
        "progressive": file(picture, "JPEG", progressive=True),
        "CMYK": file(picture.convert("CMYK"), "JPEG"),
        "lossless": file(picture, "WebP", lossless=True),
        "interlaced": file(picture.convert("P"), "GIF", interlace=1),
        "deflate": file(picture, "TIFF", compression="tiff_deflate"),
        "lzw": file(picture, "TIFF", compression="tiff_lzw"),
        "JPEG in TIFF": file(picture, "TIFF", compression="jpeg"),
        "animated GIF": frames("GIF"),
        "animated WebP": frames("WebP"),
        "animated PNG": frames("PNG"),
        "palette": file(picture.quantize(32), "PNG", transparency=1),
        "plain PPM": b"P3 2 2 255\n" + b"1 2 3 " * 4,
    }


def try_decode(data: bytes, policy: ImagePolicy = PARITY) -> Image.Image | None:
    """Decode, or return None if refused; any error but a plain ImageError fails the test."""
    refused, image = None, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "image bytes: has several frames")
            image = decode(data, policy, MAX_PIXELS, "image bytes")
    except ImageError as error:
        refused = error
    if refused is not None:
        said = "".join(traceback.format_exception_only(refused))
        assert any(f"image bytes: {words}" in said for words in OURS), said
        assert " 0x" not in said
        assert "PIL" not in said
        assert refused.__context__ is None or refused.__suppress_context__
    return image


@pytest.mark.parametrize("name", samples())
def test_cut_files_are_read_or_refused(name: str) -> None:
    whole = samples()[name]
    picture = try_decode(whole)
    assert picture is not None
    for twentieths in range(20):
        cut = whole[: len(whole) * twentieths // 20]
        for policy in ImagePolicy:
            got = try_decode(cut, policy)
            # The first frame may be complete, or the cut bytes may be padding
            if got is not None:
                assert name.startswith("animated") or twentieths > 10
                assert got.size == picture.size


def flips() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(0)
    names = sorted(samples())
    for number in range(100 * len(names)):
        name = names[number % len(names)]
        data = bytearray(samples()[name])
        for _ in range(rng.choice((1, 1, 4))):
            # Headers are short and have many fields, so half of the flips are there
            at = rng.randrange(min(200, len(data)) if rng.random() < 0.5 else len(data))
            data[at] ^= rng.randrange(1, 256)
        yield name, bytes(data)


def test_flipped_bytes_are_read_or_refused() -> None:
    outcomes = {True: 0, False: 0}
    for _, data in flips():
        for policy in (PARITY, CORRECT):
            outcomes[try_decode(data, policy) is not None] += 1
    # Both outcomes must occur, or the flips test nothing
    assert min(outcomes.values()) > 100


# transformers' reading warns, this package's must not
@pytest.mark.filterwarnings("ignore:::PIL")
def test_flipped_bytes_give_transformers_result() -> None:
    theirs: Any = Idefics2ImageProcessorPil()
    for name, data in flips():
        wanted = None
        with contextlib.suppress(Exception):
            loaded = transformers_load_image(Image.open(io.BytesIO(data)))
            wanted = theirs.convert_to_rgb(loaded)
        got = try_decode(data)
        assert (got is None) == (wanted is None), name
        if got is not None:
            np.testing.assert_array_equal(np.array(got), wanted, name)


def test_strict_accepts_no_more_than_parity() -> None:
    for _, data in flips():
        if try_decode(data, STRICT) is not None:
            assert try_decode(data, PARITY) is not None


def test_random_bytes_after_every_beginning_are_read_or_refused() -> None:
    rng = random.Random(1)
    for beginning in (*(data[:n] for data in samples().values() for n in (2, 4, 12, 26)), b""):
        try_decode(beginning + rng.randbytes(300))


@cache
def bombs() -> dict[str, bytes]:
    text = zlib.compress(bytes(80 << 20), 9)
    huge = (60000).to_bytes(2, "little")
    gif = bytearray(file(noise(4, 4).convert("P"), "GIF"))
    gif[6:10] = huge * 2
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    bmp = bytearray(file(noise(4, 4), "BMP"))
    bmp[18:26] = (60000).to_bytes(4, "little") * 2
    tags = ((256, 4, 1, 60000), (257, 4, 1, 60000), (258, 3, 1, 8), (273, 4, 1, 8), (277, 3, 1, 1))
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return {
        "PNG of 60000 x 60000": png_file(60000, 60000, zlib.compress(bytes(1 << 20))),
        "text chunk": png_file(4, 4, zlib.compress(bytes(52)), more=(b"zTXt", b"a\0\0" + text)),
        "unicode chunk": png_file(
            4, 4, zlib.compress(bytes(52)), more=(b"iTXt", b"a\0\1\0\0\0" + text)
        ),
        "profile chunk": png_file(4, 4, zlib.compress(bytes(52)), more=(b"iCCP", b"a\0\0" + text)),
        "pixels that go on": png_file(4, 4, text),
        "GIF screen": bytes(gif),
        "WebP canvas": webp + bytes(64),
        "BMP": bytes(bmp),
        "TIFF": tiff + bytes(64),
        "PPM": b"P6 60000 60000 255\n" + bytes(64),
        "PPM of digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    }


@pytest.mark.parametrize("name", bombs())
def test_decompression_bombs_use_little_memory_and_work(name: str) -> None:
    """The process may use 300 MiB beyond its start, and 10,000 calls of functions."""
    script = (
        "import pathlib, resource, sys; from idefics2_engine.images.decoder import decode;"
        "from idefics2_engine.errors import ImageError;"
        "from idefics2_engine.images.policy import ImagePolicy;"
        "data, calls = sys.stdin.buffer.read(), [];"
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2);"
        "sys.setprofile(lambda frame, event, what: calls.append(event) if 'call' in event else None)\n"
        "try: print(decode(data, ImagePolicy.PARITY, 89478485, 'bomb').size, end=' ')\n"
        "except ImageError as error: print(error, end=' ')\n"
        "sys.setprofile(None)\n"
        "print(len(calls) < 10000, end='')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], input=bombs()[name], capture_output=True
    )
    said = done.stdout.decode()
    assert done.stderr == b"", done.stderr
    assert said.endswith(" True"), said
    if "60000" in said or "16383" in said:
        assert "must have at most 89478485 pixels, got" in said
    if name in ("PNG of 60000 x 60000", "GIF screen", "BMP", "TIFF", "PPM", "WebP canvas"):
        assert "must have at most 89478485 pixels, got" in said


def test_pixel_limit_does_not_change_pillows() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    data = file(noise(10, 10), "PNG")
    assert decode(data, PARITY, 100, "a").size == (10, 10)
    with pytest.raises(ImageError, match="a: must have at most 99 pixels, got 10 x 10"):
        decode(data, PARITY, 99, "a")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pixel_limit_applies_to_every_format() -> None:
    alpha = noise(37, 23, "RGBA")
    more = {"VP8X": file(alpha, "WebP"), "lossless alpha": file(alpha, "WebP", lossless=True)}
    for name, data in (samples() | more).items():
        picture = try_decode(data)
        assert picture is not None
        width, height = picture.size
        with pytest.raises(ImageError, match=f"a: must have at most .* got {width} x {height}$"):
            decode(data, PARITY, width * height - 1, "a")
        assert decode(data, PARITY, width * height, name).size == picture.size


def test_low_pillow_limit_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow itself would raise above 80 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert decode(file(noise(10, 10), "PNG"), PARITY, 100, "a").size == (10, 10)


def test_removing_ppm_comments_gives_pillows_pixels() -> None:
    rng = random.Random(2)
    for kind, most in (("P1", 1), ("P2", 255), ("P3", 255)):
        count = 120 if kind == "P3" else 40
        digits = "".join(
            f"{rng.randint(0, most)}"
            + rng.choice((" ", "\n", " # 1 2\n", " #\r", "#\n ", "\n##\n"))
            for _ in range(count * 9)
        )
        depth = "" if kind == "P1" else f"{most}\n"
        data = f"{kind} #a\n 40 9 {depth}{digits}".encode()
        assert data.count(b"#") > 100
        wanted = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(np.array(decode(data, PARITY, MAX_PIXELS, "a")), wanted)


FOREIGN = {
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "EPS for DOS": b"\xc5\xd0\xd3\xc6" + bytes(28),
    "PDF": b"%PDF-1.7\n",
    "HTML": b"<!DOCTYPE html><html></html>",
    "PSD": b"8BPS\0\1" + bytes(40),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(24),
    "JPEG 2000": b"\xff\x4f\xff\x51" + bytes(24),
    "ICO": b"\0\0\1\0\1\0" + bytes(24),
    "WAV": b"RIFF\x24\0\0\0WAVEfmt ",
    "PFM": b"Pf\n2 2\n-1.0\n" + bytes(16),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused(name: str) -> None:
    # The message shows nothing of the contents
    got = "another kind of file" if FOREIGN[name] else "no bytes"
    message = rf"^a: must be an image file \(PNG, JPEG, .* PPM\), got {got}$"
    with pytest.raises(ImageError, match=message):
        decode(FOREIGN[name], PARITY, MAX_PIXELS, "a")


def test_plugins_of_other_formats_are_not_loaded() -> None:
    script = (
        "import sys; from idefics2_engine.images.decoder import decode;"
        "from idefics2_engine.errors import ImageError;"
        "from idefics2_engine.images.policy import ImagePolicy\n"
        "for data in eval(sys.stdin.read()):\n"
        "  try: decode(data, ImagePolicy.PARITY, 999999, 'a')\n"
        "  except ImageError: pass\n"
        "print(sorted(name for name in sys.modules if name.endswith('ImagePlugin')))"
    )
    files = [*FOREIGN.values(), *samples().values()]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=repr(files),
        capture_output=True,
        text=True,
        check=True,
    )
    names = ("Bmp", "Gif", "Jpeg", "Png", "Ppm", "Tiff", "WebP")
    assert done.stdout == f"{[f'PIL.{name}ImagePlugin' for name in names]}\n"


def test_pillow_warnings_are_suppressed_and_filters_unchanged() -> None:
    palette = file(noise(9, 9).quantize(8), "PNG", transparency=bytes(8))
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(palette, PARITY, MAX_PIXELS, "a")
    assert caught == []
    assert list(warnings.filters) == before


def test_threads_agree_and_leave_the_filters_unchanged() -> None:
    """Filters turn warnings into errors, and some of the files make Pillow warn."""
    palette = file(noise(9, 9).quantize(8), "PNG", transparency=bytes(8))
    files = [data for _, data in flips()][:150] + [palette] * 150
    before = list(warnings.filters)

    def read(index: int) -> bytes | None:
        try:
            return decode(files[index], PARITY, MAX_PIXELS, "a").tobytes()
        except ImageError:
            return None

    alone = [read(index) for index in range(len(files))]
    assert alone[-1] is not None
    assert read_all(read, [object() for _ in files], 8) == alone
    assert list(warnings.filters) == before


def test_pillow_warns_again_after_decoding() -> None:
    palette: Any = Image.open(
        io.BytesIO(file(noise(9, 9).quantize(8), "PNG", transparency=bytes(8)))
    )
    decode(file(noise(2, 2), "PNG"), PARITY, MAX_PIXELS, "a")
    with pytest.warns(UserWarning, match="Palette images"):
        palette.convert("RGB")


@pytest.mark.parametrize("kind", FORMATS)
def test_sides_of_ten_thousand_are_read(kind: str) -> None:
    for size in ((1, 1), (1, 10000), (10000, 1)):
        picture = noise(*size)
        got = decode(file(picture, kind), CORRECT, MAX_PIXELS, "a")
        assert got.size == size
        if kind in ("PNG", "BMP", "TIFF", "PPM"):
            np.testing.assert_array_equal(np.array(got), np.array(picture))
