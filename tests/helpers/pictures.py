"""Small images in every mode and files in every format, drawn when they are needed."""

import io
import zlib
from typing import Any

import numpy as np
from PIL import Image

MODES = (
    "1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX",
    "RGBa", "La", "I;16", "I;16L", "I;16B", "I;16N",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", "PPM")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return random pixels, equal for equal arguments; F is in [0, 1] and I has 16 bits."""
    rng = np.random.default_rng([width, height, len(mode), *mode.encode()])
    size = width, height
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.int32))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, rng.bytes(width * height * 2))
    if mode == "LAB":
        return Image.frombytes(mode, size, rng.bytes(width * height * 3))
    colors = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "La":
        return colors.convert("LA").convert("La")
    if mode in ("RGBA", "LA", "PA", "RGBa"):
        return colors.convert(mode)
    return colors.convert("RGB").convert(mode)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return ``image`` as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(image: Image.Image, kind: str, orientation: int) -> bytes:
    """Return a file with the EXIF orientation 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(image, kind, exif=exif)


def frames(kind: str) -> bytes:
    """Return a file with three frames or pages of different colors."""
    first, *rest = [noise(17 + n, 23, "RGB").resize((20, 23)) for n in range(3)]
    return file(first, kind, save_all=True, append_images=rest)


def transparent_palette() -> bytes:
    """Return a PNG whose palette has a transparent color."""
    return file(noise(19, 13).quantize(16), "PNG", transparency=3)


def sixteen_bits(width: int = 21, height: int = 11) -> bytes:
    """Return a gray PNG of 16 bits."""
    return file(noise(width, height, "I;16"), "PNG")


def sixteen_bits_rgb() -> bytes:
    """Return a PNG of 16 bits a channel, written by hand because Pillow only reads such files."""
    pixels = np.random.default_rng(0).integers(0, 65536, (3, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png_file(5, 3, zlib.compress(rows), bits=16)


def png_file(
    width: int,
    height: int,
    compressed: bytes,
    bits: int = 8,
    more: tuple[bytes, bytes] | None = None,
) -> bytes:
    """Return an RGB PNG, written by hand, with one more chunk (name, body) before the pixels."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([bits, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), *([more] if more else []), (b"IDAT", compressed), (b"IEND", b"")]
    body = b"".join(
        len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
