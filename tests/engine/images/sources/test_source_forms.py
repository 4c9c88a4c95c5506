"""Every form in which a caller passes an image, the common bounds, and objects that fail."""

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from idefics2_engine.errors import ImageError, MediaNotAllowedError
from idefics2_engine.images.loader import MediaConfig, load_image, media_config
from pictures import file, noise

IMAGE = noise(23, 19)
PNG = file(IMAGE, "PNG")
HEAD = "data:image/png;base64,"
# This ends with two "="
PLAIN = base64.b64encode(PNG + b"\0" * (1 - len(PNG) % 3)).decode()
URL = base64.urlsafe_b64encode(PNG + b"\0" * (1 - len(PNG) % 3)).decode()


class Named:
    """A path-like object of a caller's own class."""

    def __init__(self, name: str | bytes) -> None:
        self._name = name

    def __fspath__(self) -> str | bytes:
        return self._name


class OnlyRead:
    """A binary file that cannot seek and returns few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._rest = io.BytesIO(data)
        self.read_bytes = 0

    def read(self, size: int) -> bytes:
        part = self._rest.read(min(size, 100))
        self.read_bytes += len(part)
        return part


def at_the_end(data: bytes) -> io.BytesIO:
    """Return a buffer at its end, as after writing an image to it."""
    buffer = io.BytesIO()
    buffer.write(data)
    return buffer


FORMS: dict[str, Callable[[Path], Any]] = {
    "path-like": lambda path: Named(str(path)),
    "path-like of bytes": lambda path: Named(os.fsencode(path)),
    "BytesIO": lambda path: io.BytesIO(PNG),
    "BytesIO at its end": lambda path: at_the_end(PNG),
    "buffered file": lambda path: io.BufferedReader(io.BytesIO(PNG)),
    "read alone": lambda path: OnlyRead(PNG),
    "bytes and no path": lambda path: {"bytes": PNG, "path": None},
    "bytes alone": lambda path: {"bytes": PNG},
    "bytes win": lambda path: {"bytes": PNG, "path": "no such file"},
    "bytearray in a dict": lambda path: {"bytes": bytearray(PNG), "path": None},
    "path and no bytes": lambda path: {"bytes": None, "path": str(path)},
    "path alone": lambda path: {"path": path},
    "file URL": lambda path: path.as_uri(),
    "file URL with a host": lambda path: f"FILE://localhost{quote(str(path))}",
    "file URL, all encoded": lambda path: (
        "file:///" + "".join(f"%{byte:02x}" for byte in os.fsencode(path)[1:])
    ),
    "base64, no padding": lambda path: HEAD + PLAIN.rstrip("="),
    "base64, URL alphabet": lambda path: HEAD + URL,
    "base64, URL alphabet, no padding": lambda path: HEAD + URL.rstrip("="),
    "base64, white space": lambda path: HEAD + "\n " + "\r\n\t\f\v".join(PLAIN[:200]) + PLAIN[200:],
    "base64, percent-encoded": lambda path: HEAD + quote(PLAIN, safe=""),
}


def test_alphabets_differ() -> None:
    assert PLAIN != URL
    assert PLAIN.endswith("==")


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_pixels(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a pict%20ure #1?ü.png"
    path.write_bytes(PNG)
    np.testing.assert_array_equal(np.array(load_image(FORMS[form](path))), np.array(IMAGE))


def test_open_file_is_read_from_its_start_and_keeps_its_position(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with open(tmp_path / "a.png", "rb") as opened:
        opened.seek(7)
        for _ in range(2):
            assert load_image(opened).size == (23, 19)
            assert opened.tell() == 7
    buffer = at_the_end(PNG)
    load_image(buffer)
    buffer.write(b"more")
    assert buffer.getvalue() == PNG + b"more"


def test_path_like_objects_and_file_urls_must_be_below_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(PNG)
    config = media_config(allowed_media_root=root)
    inside: list[Any] = [
        Named(str(root / "a.png")),
        (root / "a.png").as_uri(),
        {"bytes": None, "path": str(root / "a.png")},
    ]
    for source in inside:
        assert load_image(source, config).size == (23, 19)
    away = f"file://{root}/%2e%2E%2foutside/a.png"
    assert load_image(away).size == (23, 19)
    sources: list[Any] = [
        Named(str(outside / "a.png")),
        (outside / "a.png").as_uri(),
        away,
        {"path": str(outside / "a.png")},
        {"bytes": None, "path": (outside / "a.png").as_uri()},
    ]
    for source in sources:
        with pytest.raises(MediaNotAllowedError, match="must lie below the allowed folder"):
            load_image(source, config)
    # A file that the caller has opened is allowed, like bytes
    with open(outside / "a.png", "rb") as opened:
        assert load_image(opened, config).size == (23, 19)


def test_byte_limit_applies_to_every_form(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for name, form in FORMS.items():
        size = len(PNG) if "base64" not in name else len(PNG) + 1 - len(PNG) % 3
        assert load_image(form(path), MediaConfig(max_media_bytes=size)).size == (23, 19), name
        with pytest.raises(ImageError, match=rf"must have at most {len(PNG) - 3} bytes, got"):
            load_image(form(path), MediaConfig(max_media_bytes=len(PNG) - 3))


def test_open_file_is_read_up_to_the_byte_limit() -> None:
    stream: Any = OnlyRead(PNG + b"\0" * 5000)
    with pytest.raises(ImageError, match="image file: must have at most 250 bytes, got more"):
        load_image(stream, MediaConfig(max_media_bytes=250))
    assert stream.read_bytes == 251


def test_whitespace_in_base64_does_not_count() -> None:
    spread = HEAD + " \n".join(PLAIN)
    size = len(base64.b64decode(PLAIN))
    assert load_image(spread, MediaConfig(max_media_bytes=size)).size == (23, 19)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "file://example.org/a.png",
            r"file URL: must be file:///path .* got the host 'example.org'",
        ),
        ("file://localhost:80/a.png", "got the host 'localhost:80'"),
        ("file://a.png", "got the host 'a.png'"),
        ("file:///a.png?x", r"must write '\?' and '#' of a name as %3F and %23"),
        ("file:///a.png#x", r"must write '\?' and '#' of a name as %3F and %23"),
        ("file:///no/such", "^/no/such: cannot be read as an image: no such file"),
        ("file:///a%00b", "cannot be read as an image: no such name"),
        ("file://", "cannot be read as an image: is a directory"),
        ("data:image/png;base64,abcde", "data URI: must be base64"),
        ("data:image/png;base64,ab=", "data URI: must be base64"),
        ("data:image/png;base64,abc==", "data URI: must be base64"),
        ("data:image/png;base64,ab=c", "data URI: must be base64"),
        ("data:image/png;base64,abcd====", "data URI: must be base64"),
        ("data:image/png;base64,%zz", "data URI: must be base64"),
        ({}, "a dict must have 'bytes' or 'path' and nothing else, got {}"),
        ({"bytes": None, "path": None}, "a dict must have 'bytes' or 'path' and nothing else"),
        ({"bytes": PNG, "url": "x"}, "a dict must have 'bytes' or 'path' and nothing else"),
        ({"bytes": "text"}, "'bytes' must be bytes, got str"),
        ({"path": 7}, "'path' must be a path, got 7"),
        ({"bytes": b"", "path": "a.png"}, "image bytes: must be an image file .* got no bytes"),
        (io.StringIO("text"), "image file: must be open in binary mode, got str from it"),
        (object(), "must be a path, .* got object"),
    ],
)
def test_forms_without_an_image_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


class FailingPath:
    def __fspath__(self) -> str:
        raise OSError("secret")


class FailingFile:
    def read(self, size: int) -> bytes:
        raise RuntimeError("secret")


class FailingMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise OSError("secret")

    def __iter__(self) -> Iterator[str]:
        return iter(["bytes"])

    def __len__(self) -> int:
        return 1


class FailingImage(Image.Image):
    @property
    def size(self) -> Any:
        raise KeyError("secret")


class FailingAttribute:
    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError("secret")


class FailingUfunc(np.ndarray[Any, Any]):
    def __array_ufunc__(self, *args: Any, **options: Any) -> Any:
        raise OSError("secret")


class FailingFunction(np.ndarray[Any, Any]):
    def __array_function__(self, *args: Any, **options: Any) -> Any:
        raise OSError("secret")

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise OSError("secret")


class FailingAttributes(np.ndarray[Any, Any]):
    def __getattribute__(self, name: str) -> Any:
        # isinstance reads this attribute
        if name == "__class__":
            return type(self)
        raise OSError("secret")


class FailingTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **options: Any) -> Any:
        raise OSError("secret")


def closed() -> io.BytesIO:
    buffer = io.BytesIO(PNG)
    buffer.close()
    return buffer


def released() -> memoryview:
    view = memoryview(PNG)
    view.release()
    return view


@pytest.mark.parametrize(
    "source",
    [
        FailingPath(),
        FailingFile(),
        FailingMapping(),
        FailingImage(),
        FailingAttribute(),
        torch.zeros(3, 4, 4).as_subclass(FailingTensor),
        closed(),
        released(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_exceptions_of_objects_become_image_errors(source: Any) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert "secret" not in str(caught.value)


def test_object_with_a_raising_class_is_an_image_error() -> None:
    def secret(self: object) -> type:
        raise OSError("secret")

    # The object is created here, because pytest asks each collected object for its class
    nameless = type("Nameless", (), {"__class__": property(secret)})
    with pytest.raises(ImageError, match=r"^image: reading it raised OSError$"):
        load_image(nameless())


@pytest.mark.parametrize("kind", [FailingUfunc, FailingFunction, FailingAttributes])
@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 5, 7), (5, 7, 4)])
def test_methods_of_array_subclasses_are_not_called(kind: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    if 4 in shape:
        array = np.rint(array / 255)
    wanted = np.array(load_image(array))
    np.testing.assert_array_equal(np.array(load_image(array.view(kind))), wanted)
