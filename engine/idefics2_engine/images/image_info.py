"""What is known of an image besides its pixels."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image as it was before it was turned upright and converted to RGB.

    Attributes:
        width: Pixels of a row.
        height: Rows.
        sha256: SHA-256 of the file in hex. ``None`` if the image was no file.
        mode: Pillow's name of the pixels' form, such as ``RGB``. ``None`` for arrays and tensors.
        format: Kind of the file, such as ``JPEG``. ``None`` if the image was no file.
        orientation: EXIF orientation, 1 to 8. 1 if there is none.
        warnings: What was not read of it.
    """

    width: int
    height: int
    sha256: str | None = None
    mode: str | None = None
    format: str | None = None
    orientation: int = 1
    warnings: tuple[str, ...] = ()
