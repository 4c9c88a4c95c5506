"""Small files that would be expensive to read: refused before the work, unlike ordinary files.

Work is counted as calls of Python and C functions, so no test depends on the machine's speed.
"""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idefics2_engine.errors import ImageError
from idefics2_engine.images import policy as image_policy
from idefics2_engine.images.bounds.bounded_file import BoundedFile
from idefics2_engine.images.decoder import decode
from idefics2_engine.images.loader import MAX_PIXELS
from idefics2_engine.images.policy import ImagePolicy
from pictures import file, frames, noise

PARITY, CORRECT, STRICT = ImagePolicy
# {number: (type, count, value or content)}
Tags = dict[int, tuple[int, int, int | bytes]]


def calls(work: Callable[[], object]) -> int:
    """Return the number of calls of Python and C functions in ``work``."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def read(data: bytes, policy: ImagePolicy = PARITY) -> Image.Image:
    return decode(data, policy, MAX_PIXELS, "a")


@cache
def sample(kind: str) -> bytes:
    return file(noise(16, 16), kind)


def segment(code: int, body: bytes) -> bytes:
    return bytes((0xFF, code)) + (len(body) + 2).to_bytes(2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def directory(tags: Tags, at: int = 8) -> bytes:
    """Return a TIFF directory for the offset ``at``."""
    rest = at + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for number, (kind, count, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            where = rest + len(values)
            values += value
        else:
            where = value
        entries += struct.pack("<HHII", number, kind, count, where)
    return struct.pack("<H", len(tags)) + entries + bytes(4) + values


def tiff(width: int, height: int, more: Tags) -> bytes:
    """Return a gray TIFF file of a header and a directory, without pixels."""
    tags: Tags = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        277: (3, 1, 1),
    }  # fmt: skip
    return b"II*\0\x08\0\0\0" + directory(tags | more)


def run_length_bmp(width: int, height: int, body: bytes, kind: int = 1) -> bytes:
    head = struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, kind, 0, 0, 0, 256, 0)
    return b"BM" + head + b"".join(bytes((n, n ^ 1, n, 0)) for n in range(256)) + body


def webp_frames(count: int) -> bytes:
    still = file(noise(16, 16), "WebP", lossless=True)[12:]
    size = b"\x0f\0\0" * 2
    frame = bytes(6) + size + b"\x64\0\0\0" + still
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += (b"ANMF" + struct.pack("<I", len(frame)) + frame) * count
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(tags: Tags, more: bytes = b"") -> bytes:
    return b"II*\0\x08\0\0\0" + directory(tags) + more


def jpeg_with(*segments: bytes) -> bytes:
    return sample("JPEG")[:2] + b"".join(segments) + sample("JPEG")[2:]


def png_with(*chunks: bytes, late: bool = False) -> bytes:
    png = sample("PNG")
    at = len(png) - 12 if late else 33
    return png[:at] + b"".join(chunks) + png[at:]


def gif_with(more: bytes) -> bytes:
    gif = sample("GIF")
    screen = 13 + 3 * (2 << (gif[10] & 7))
    return gif[:screen] + more + gif[screen:]


def many_scans(count: int) -> bytes:
    data = file(noise(16, 16), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * (count + 1 - data.count(b"\xff\xda")) + data[-2:]


def shorts(count: int, first: int = 1000) -> Tags:
    return {first + n: (3, 1, 1) for n in range(count)}


@cache
def attacks() -> dict[str, tuple[bytes, str]]:
    """Return each file and the end of its error message."""
    text = zlib.compress(bytes(1 << 20), 9)
    rows = struct.pack("<100000I", *range(8, 100_008))
    overlapping: Tags = dict.fromkeys(range(1000, 2000), (7, 60000, 100))
    long_exif = exif(shorts(2000))
    pointed = len(tiff(4, 4, {273: (4, 1, 8), 34665: (4, 1, 0)}))
    streams = many_scans(40)
    in_tiff: Tags = {259: (3, 1, 7), 273: (4, 1, 0), 278: (3, 1, 16), 279: (4, 1, len(streams))}
    in_tiff[273] = (4, 1, len(tiff(16, 16, in_tiff)))
    shared: Tags = {259: (3, 1, 7), 278: (3, 1, 1), 273: (4, 1000, bytes(4000))}
    shared[279] = (4, 1000, struct.pack("<I", 60_000) * 1000)
    python = r"must have at most 1048576 pixels and bytes in run-length encoding, got"
    steps = r"must be read in at most 16\d{3} steps at its size, got more"
    tags = r"must have at most 1024 tags, got"
    values = r"must have at most 262144 values in tags .*, got"
    strips = r"must have at most \d+ strips or tiles at its size, got"
    scans = r"must have at most 24 scans, got more"
    return {
        "RLE8": (run_length_bmp(89_000_000, 1, b"\1\1\0\0\0\1"), python),
        "RLE4": (run_length_bmp(9_000, 9_000, b"\xff\1\0\0\0\1", 2), python),
        "RLE of empty runs": (run_length_bmp(16, 16, b"\0\0" * 600_000), python),
        "header of a PPM": (b"P6 #" + b"x" * 100_000 + b"\n2 2 255\n" + bytes(12), steps),
        "digits": (b"P3 2000 2000 255\n" + b"1 " * 9, "must have at most 4194304 numbers in digits"),
        "fill": (jpeg_with(b"\xff" * 100_000), "must have at most 4096 bytes of fill, got more"),
        "stuffing": (jpeg_with(b"\xff\0" * 50_000), "must have at most 4096 bytes of fill"),
        "markers": (jpeg_with(b"\xff\xd0" * 50_000), "must have at most 1000 segments of 16777216"),
        "comments": (jpeg_with(segment(0xFE, b"") * 2000), "must have at most 1000 segments"),
        "profiles": (jpeg_with(segment(0xE2, bytes(65_000)) * 260), "segments of 16777216 bytes"),
        "tables": (
            jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 9),
            "must have at most 524288 bytes of tables, and of tags",
        ),
        "Photoshop": (
            jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5400) * 9),
            "must have at most 524288 bytes of tables, and of tags",
        ),
        "EXIF in parts": (
            jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 9),
            "must have at most 524288 bytes of tables, and of tags",
        ),
        "EXIF overlapping": (
            jpeg_with(segment(0xE1, b"Exif\0\0" + exif(overlapping, bytes(50_000)))),
            "must have at most 16777216 bytes in tags",
        ),
        "EXIF of many tags": (jpeg_with(segment(0xE1, b"Exif\0\0" + long_exif)), tags),
        "EXIF of rationals": (
            jpeg_with(
                *[
                    segment(0xE1, b"Exif\0\0" + part)
                    for part in (exif({0x11A: (5, 20_000, 100)}), *[bytes(60_000)] * 3)
                ]
            ),
            values,
        ),
        "no end of segments between scans": (
            sample("JPEG")[:-2] + segment(0xFE, b"") * 2000 + b"\xff\xd9",
            "must have at most 1000 segments between scans",
        ),
        "scans": (many_scans(40), scans),
        "one scan without end": (
            sample("JPEG")[:-2] + bytes(2 << 20) + b"\xff\xd9",
            "must have at most 1052672 bytes in scans at its size",
        ),
        "chunks": (png_with(chunk(b"abCd", b"") * 2000), "must have at most 1024 chunks at its size"),
        "late chunks": (png_with(chunk(b"abCd", b"") * 2000, late=True), "at most 1024 chunks"),
        "chunks of pixels": (png_with(chunk(b"IDAT", b"") * 2000), "at most 1024 chunks"),
        "chunks of an APNG": (
            png_with(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"abCd", b"") * 20_000),
            "must have at most 16384 chunks",
        ),
        "texts": (png_with(chunk(b"zTXt", b"\0\0" + text) * 30), "must have at most 20 zTXt, iTXt"),
        "late texts": (png_with(chunk(b"iTXt", b"\0\1\0\0\0" + text) * 30, late=True), "at most 20"),
        "profiles of a PNG": (png_with(chunk(b"iCCP", b"a\0\0" + text) * 30), "at most 20 zTXt, iTXt"),
        "long text": (png_with(chunk(b"tEXt", b"a\0" + bytes(17 << 20))), "and 16777216 bytes beside"),
        "EXIF of a PNG": (png_with(chunk(b"eXIf", long_exif)), tags),
        "late EXIF": (png_with(chunk(b"eXIf", long_exif), late=True), tags),
        "EXIF in digits": (
            png_with(
                chunk(
                    b"zTXt",
                    b"Raw profile type exif\0\0"
                    + zlib.compress(b"\nexif\n9\n" + long_exif.hex().encode()),
                )
            ),
            tags,
        ),
        "EXIF of a WebP": (
            sample("WebP") + b"EXIF" + struct.pack("<I", len(long_exif)) + long_exif,
            tags,
        ),
        "frames of a WebP": (webp_frames(17_000), "must have at most 16384 chunks, got more"),
        "comments of a GIF": (gif_with(b"!\xfe\1x\0" * 50_000), steps),
        "blocks of a GIF": (gif_with(b"!\xff" + b"\1x" * 50_000 + b"\0"), steps),
        "junk in a GIF": (gif_with(b"x" * 50_000), steps),
        "strips of a pixel": (
            tiff(1, 100_000, {273: (4, 100_000, rows), 278: (3, 1, 1)}) + bytes(100_000), strips
        ),
        "strips that are one": (
            tiff(1, 100_000, {273: (4, 100_000, bytes(400_000)), 278: (3, 1, 1)}), strips
        ),
        "strips that overlap": (
            tiff(1_000_000, 2, {273: (4, 2, struct.pack("<2I", 200, 201)), 278: (3, 1, 1)})
            + bytes(2_000_000),
            "must have strips apart from each other, got some that overlap",
        ),
        "tile of 900 megapixels": (
            tiff(1, 1, {259: (3, 1, 8), 322: (4, 1, 30_000), 323: (4, 1, 30_000), 324: (4, 1, 8),
                        325: (4, 1, 99)}),
            "must have tiles of at most 1048580 pixels together at its size, got 1 x 1 of 30000 x",
        ),
        "tiles of a pixel": (
            tiff(1000, 1000, {322: (4, 1, 1), 323: (4, 1, 1), 324: (4, 1, 8)}), strips
        ),
        "tags": (tiff(4, 4, shorts(2000)), tags),
        "a tag twice": (
            b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 322, 4, 1, 16) * 2 + bytes(100),
            "must have each tag once, got tag 322 again",
        ),
        "directory in a circle": (
            tiff(4, 4, {273: (4, 1, 8), 34665: (4, 1, 8)}) + bytes(100), tags
        ),
        "directory of rationals": (
            tiff(4, 4, {273: (4, 1, 8), 34665: (4, 1, pointed)})
            + struct.pack("<HHHII", 1, 0x9000, 5, 20_000, 8) + bytes(200_000),
            values,
        ),
        "scans in a TIFF": (tiff(16, 16, in_tiff) + streams, scans),
        "strips that share a stream": (
            tiff(16, 1000, shared) + bytes(60_000),
            "must have at most 1304576 bytes in strips or tiles at its size, got more",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks())
def test_attacks_are_refused_before_the_work(name: str) -> None:
    data, message = attacks()[name]

    def refuse() -> None:
        with pytest.raises(ImageError, match=f"a: .*{message}"):
            read(data)

    assert calls(refuse) < 120_000


def test_number_of_blocks_between_gif_frames_is_bounded() -> None:
    many = sample("GIF")[:-1] + b"!\xfe" + b"\1x" * 50_000 + b"\0;"
    # Blocks after the first frame are not read
    assert read(many).size == (16, 16)

    def refuse() -> None:
        with pytest.raises(ImageError, match=r"a: must be read in at most \d+ steps"):
            read(many, CORRECT)

    assert calls(refuse) < 120_000


def ordinary() -> dict[str, bytes]:
    """Return ordinary files that resemble the attacks."""
    picture = noise(64, 48)
    camera = Image.Exif()
    camera[0x010F], camera[0x011A] = "maker", 72.0
    camera.get_ifd(0x8769)[0x927C] = bytes(40_000)
    appended = b"\xff\xda\0\x0c" * 500 + b"\xff\xe1\0\x04" * 500 + b"\xff" * 9000
    return {
        "18 scans": file(picture.convert("CMYK"), "JPEG", progressive=True),
        "20 scans": many_scans(20),
        "video behind a JPEG": file(picture, "JPEG") + appended,
        "another JPEG behind": file(picture, "JPEG") + many_scans(40),
        "restarts": file(picture, "JPEG", restart_marker_blocks=1),
        "camera": file(picture, "JPEG", exif=camera),
        "camera's PNG": file(picture, "PNG", exif=camera),
        "camera's WebP": file(picture, "WebP", exif=camera),
        "profile of 1 MB": file(picture, "JPEG", icc_profile=bytes(1 << 20)),
        "XMP": file(picture, "JPEG", xmp=bytes(60_000)),
        "tEXt": png_with(*[chunk(b"tEXt", b"a%d\0b" % n) for n in range(500)]),
        "APNG": frames("PNG"),
        "GIF with a comment of 100 kB": gif_with(
            b"!\xfe" + (b"\xff" + bytes(255)) * 400 + b"\0"
        ),
        "strips of a row": tiff(
            100, 900, {273: (4, 900, struct.pack("<900I", *range(8, 90_008, 100))), 278: (3, 1, 1)}
        ) + bytes(90_000),
        "a narrow page in strips of a row": tiff(
            20, 3000, {273: (4, 3000, struct.pack("<3000I", *range(8, 60_008, 20))), 278: (3, 1, 1)}
        )
        + bytes(60_000),
        "tiles": tiff(
            300, 300, {322: (3, 1, 256), 323: (3, 1, 256), 324: (4, 4, struct.pack("<4I", *[8] * 4))}
        ) + bytes(256 * 256),
        "pages": frames("TIFF"),
        "BigTIFF": file(picture, "TIFF", big_tiff=True),
        "layers": file(picture, "TIFF", tiffinfo={37724: bytes(1 << 20)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", ordinary())
def test_ordinary_files_are_read(name: str) -> None:
    data = ordinary()[name]
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(np.array(read(data)), wanted)


def test_ordinary_run_length_encoding_is_read() -> None:
    body = b"".join(bytes((200, n % 256, 56, 7, 0, 0)) for n in range(100)) + b"\0\1"
    for kind in (1, 2):
        data = run_length_bmp(256, 100, body, kind)
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(np.array(read(data)), wanted)


def ppm(kind: int, most: int | None, bands: int, size: tuple[int, int] = (31, 17)) -> bytes:
    rng = np.random.default_rng([kind, most or 1, bands])
    numbers = rng.integers(0, (most or 1) + 1, size[0] * size[1] * bands)
    head = b"P%d %d %d\n" % (kind, *size) + (b"" if most is None else b"%d\n" % most)
    if kind > 3:
        return head + numbers.astype(np.uint8 if (most or 1) < 256 else ">u2").tobytes()
    return head + b" ".join(b"%d" % number for number in numbers)


@pytest.mark.parametrize("policy", [PARITY, CORRECT])
@pytest.mark.parametrize("most", [1, 2, 100, 254, 255, 256, 1023, 65534, 65535])
@pytest.mark.parametrize(("kind", "bands"), [(2, 1), (3, 3), (5, 1), (6, 3)])
def test_ppm_samples_equal_pillows(kind: int, bands: int, most: int, policy: ImagePolicy) -> None:
    data = ppm(kind, most, bands)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.array(image_policy.upright_rgb(image, policy, "a"))
    np.testing.assert_array_equal(np.array(read(data, policy)), wanted)


def test_ppm_bits_in_digits_equal_pillows() -> None:
    data = ppm(1, None, 1)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.array(image.convert("RGB"))
    for text in (data, data[:8] + data[8:].replace(b" ", b"").replace(b"1", b"1 #0\n", 20)):
        np.testing.assert_array_equal(np.array(read(text)), wanted)


@pytest.mark.parametrize(
    "data",
    [
        b"P1 2 2\n1 0 1", b"P1 2 2\n1 0 1 2", b"P2 2 1 9\n1 10", b"P2 2 1 9\n1 -1", b"P2 2 1 9\n1",
        b"P2 2 1 9\n1 00000000001", b"P2 2 1 9\n1 x", b"P6 2 1 99\n12345", b"P5 2 1 999\n123",
    ],
)  # fmt: skip
def test_damaged_ppm_is_refused_as_by_pillow(data: bytes) -> None:
    with pytest.raises((ValueError, OSError)), Image.open(io.BytesIO(data)) as image:
        image.load()
    with pytest.raises(ImageError, match="a: cannot be read as PPM"):
        read(data)


def test_ppm_samples_are_not_read_one_by_one() -> None:
    assert calls(lambda: read(ppm(6, 254, 3, (300, 300)))) < 10_000
    # 65,536 of these calls fill a table
    assert calls(lambda: read(ppm(5, 999, 1, (300, 300)))) < 140_000
    in_digits = ppm(3, 255, 3, (300, 300))
    commented = in_digits[:20] + in_digits[20:].replace(b" ", b" # x\n")
    for data in (in_digits, commented):
        assert calls(partial(read, data)) < 10_000


def test_wide_row_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = BoundedFile.read

    def recording_read(self: BoundedFile, size: int | None = -1) -> bytes:
        data = plain(self, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(BoundedFile, "read", recording_read)
    for data in (
        b"P5 4000000 1 255\n" + bytes(4_000_000),
        file(Image.new("L", (4_000_000, 1)), "BMP"),
    ):
        sizes.clear()
        assert read(data).size == (4_000_000, 1)
        # In reads of 64 KiB the row would be copied 30 times
        assert sum(size > 1000 for size in sizes) < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_image_is_blended_in_parts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise(70, 50, mode)
    transparency: dict[str, Any] = {"P": bytes(range(256)), "RGB": (1, 2, 3), "L": 7}
    if mode in transparency:
        picture.info["transparency"] = transparency[mode]
    whole = image_policy.upright_rgb(picture, ImagePolicy.CORRECT, "a")
    sizes = []
    composite = Image.alpha_composite

    def recording_composite(under: Image.Image, over: Image.Image) -> Image.Image:
        sizes.append(over.width * over.height)
        return composite(under, over)

    monkeypatch.setattr(Image, "alpha_composite", recording_composite)
    for part in (30, 100, 1000):
        sizes.clear()
        monkeypatch.setattr(image_policy, "PART_PIXELS", part)
        assert (
            image_policy.upright_rgb(picture, ImagePolicy.CORRECT, "a").tobytes() == whole.tobytes()
        )
        assert max(sizes) <= part
        assert sum(sizes) == 70 * 50


def test_rotation_does_not_rewrite_exif() -> None:
    """Writing the EXIF data again would create objects of all its values."""
    rotated = exif({0x112: (3, 1, 6), 1000: (5, 10_000, 100)}, bytes(80_000))
    upright = exif({0x112: (3, 1, 1), 1000: (5, 10_000, 100)}, bytes(80_000))
    turned, plain = (png_with(chunk(b"eXIf", one)) for one in (rotated, upright))
    wanted = np.array(read(plain)).transpose(1, 0, 2)[:, ::-1]
    np.testing.assert_array_equal(np.array(read(turned)), wanted)
    assert calls(lambda: read(turned)) < 2 * calls(lambda: read(plain))
