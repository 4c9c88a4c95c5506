"""The entry point for reading images, which converts every supported source to RGB."""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import inf
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt
from PIL import Image

from idefics2_engine.errors import ConfigError, ImageError, MediaNotAllowedError
from idefics2_engine.images.arrays import array_rgb, is_tensor, tensor_rgb
from idefics2_engine.images.decoder import check_size, decode
from idefics2_engine.images.parallel import alone_with
from idefics2_engine.images.pillow_guard import guard_pillow
from idefics2_engine.images.policy import ImagePolicy, upright_rgb
from idefics2_engine.images.sources.download import (
    FetchRules,
    Network,
    check_url,
    fetch,
    scheme_and_host,
)
from idefics2_engine.images.sources.source_forms import (
    check_bytes,
    data_uri_bytes,
    file_url_path,
    plain_source,
)

if TYPE_CHECKING:
    from torch import Tensor

ImageSource = Union[
    str,
    os.PathLike[str],
    bytes,
    bytearray,
    memoryview,
    IO[bytes],
    Mapping[str, Any],
    Image.Image,
    npt.NDArray[Any],
    "Tensor",
]
"""The types that ``load_image`` reads."""

# Pillow warns about larger images. One of this size takes a quarter of a gigabyte in RGB.
MAX_PIXELS = 89_478_485
MAX_BYTES = 256 << 20
# Longest duration of a download in seconds
MEDIA_TIMEOUT = 20.0
MAX_THREADS = 8

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class MediaConfig:
    """Rules for images: limits, allowed sources, and the policy for ambiguous images.

    Attributes:
        image_policy: See ``ImagePolicy``.
        max_image_pixels: Largest width x height, checked before decoding.
        max_media_bytes: Largest size of a file, data URI or download, in bytes.
        allowed_media_root: Folder that must contain all files. If ``None``, any folder.
        allowed_media_hosts: Hosts that URLs may name: ``"name"``, ``"name:port"``, ``".name"`` for
            all its subdomains, ``"*"`` for any. Connections are made only to public addresses.
        media_timeout: Longest duration of a download in seconds, redirects included.
        image_threads: Images that are read in parallel. If ``None``, the number of cores, at most
            8.
        allow_http: Whether URLs without TLS are allowed.
        network: Resolver, connections and clock of downloads.
    """

    image_policy: ImagePolicy = ImagePolicy.PARITY
    max_image_pixels: int = MAX_PIXELS
    max_media_bytes: int = MAX_BYTES
    allowed_media_root: Path | None = None
    allowed_media_hosts: tuple[str, ...] = ()
    media_timeout: float = MEDIA_TIMEOUT
    image_threads: int | None = None
    allow_http: bool = False
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is invalid.
        """
        for name in ("max_image_pixels", "max_media_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
        seconds = self.media_timeout
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 < seconds < inf
        ):
            raise ConfigError(f"media_timeout must be seconds above 0, got {seconds!r}")
        threads = self.image_threads
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(f"image_threads must be at least 1, got {threads!r}")
        for host in self.allowed_media_hosts:
            if not isinstance(host, str) or not host or not set(host).isdisjoint("/@ "):
                raise ConfigError(f"allowed_media_hosts must be names of hosts, got {host!r}")
        root = self.allowed_media_root
        if root is not None and not root.is_dir():
            raise ConfigError(f"allowed_media_root must be a folder, got {str(root)!r}")

    @property
    def num_threads(self) -> int:
        """Number of images that are read in parallel."""
        return self.image_threads or min(MAX_THREADS, _num_cpus())


@cache
def _num_cpus() -> int:
    # Asking the system takes as long as tokenizing a prompt
    return os.cpu_count() or 1


def media_config(
    *,
    image_policy: str = ImagePolicy.PARITY,
    max_image_pixels: int = MAX_PIXELS,
    max_media_bytes: int = MAX_BYTES,
    allowed_media_root: str | Path | None = None,
    allowed_media_hosts: Sequence[str] = (),
    media_timeout: float = MEDIA_TIMEOUT,
    image_threads: int | None = None,
) -> MediaConfig:
    """Return the rules for these arguments of ``LLM`` or options of the command line.

    Raises:
        ConfigError: A value is invalid.
    """
    if isinstance(allowed_media_hosts, str):
        raise ConfigError(
            f"allowed_media_hosts must be a list of names, got {allowed_media_hosts!r}"
        )
    return MediaConfig(
        image_policy=ImagePolicy.named(image_policy),
        max_image_pixels=max_image_pixels,
        max_media_bytes=max_media_bytes,
        allowed_media_root=None if allowed_media_root is None else Path(allowed_media_root),
        allowed_media_hosts=tuple(allowed_media_hosts),
        media_timeout=media_timeout,
        image_threads=image_threads,
    )


def load_image(source: ImageSource, config: MediaConfig | None = None) -> Image.Image:
    """Read one image, upright and in RGB.

    A Pillow image that needs no conversion is returned itself.

    Args:
        source: A path, a ``file://`` URL of this host, a URL on an allowed host, a ``data:`` URI in
            base64, the bytes of an image file, an open binary file, a Pillow image, an array or
            tensor (see ``arrays.array_rgb``), or a dict of the form
            ``{"bytes": ..., "path": ...}`` as in ``datasets``. An open file is read from its
            beginning. The bytes of a dict take precedence over its path.
        config: Rules for images. If ``None``, ``MediaConfig()``.

    Raises:
        MediaNotAllowedError: The rules do not allow the source.
        MediaFetchError: An allowed URL did not return a file in time.
        ImageError: ``source`` has another type, cannot be read or decoded, is too large, or the
            policy refuses it.
    """
    config = config or MediaConfig()
    policy, budget = config.image_policy, config.max_image_pixels
    plain = plain_source(source, config.max_media_bytes)
    if isinstance(plain, Image.Image):
        with guard_pillow("image: Pillow cannot read it as RGB"):
            # Pillow images that are not loaded may share a file
            files = (getattr(plain, name, None) for name in ("fp", "_fp"))
            with alone_with(plain, *files):
                check_size(plain.size, budget, "image")
                return upright_rgb(plain, policy, "image")
    if isinstance(plain, np.ndarray):
        return array_rgb(plain, policy, budget, "image array")
    if is_tensor(plain):
        return tensor_rgb(plain, policy, budget, "image tensor")
    name, data = named_bytes(plain, config)
    return decode(data, policy, budget, name)


def own_image(source: ImageSource, config: MediaConfig) -> ImageSource:
    """Return an image equal to ``source`` that its caller can no longer change.

    Paths, text and bytes cannot change, so they are returned to be decoded later. Open files,
    bytearrays and memoryviews are returned as bytes. Other sources are read as by ``load_image``.

    Raises:
        ImageError: As in ``load_image``.
    """
    plain: ImageSource = plain_source(source, config.max_media_bytes)
    if isinstance(plain, str | bytes | Path):
        return plain
    image = load_image(plain, config)
    if image is not source:
        return image
    with guard_pillow("image: Pillow cannot copy it"):
        return image.copy()


def named_bytes(source: str | bytes | Path, config: MediaConfig) -> tuple[str, bytes]:
    """Return the name of an image file in error messages, and its bytes.

    Raises:
        ImageError: As in ``load_image``, before anything is decoded.
    """
    if isinstance(source, bytes):
        check_bytes(len(source), config.max_media_bytes, "image bytes")
        return "image bytes", source
    if isinstance(source, str):
        if _is_data_uri(source):
            return "data URI", data_uri_bytes(source, config.max_media_bytes)
        if is_url(source):
            return "downloaded image", fetch(source, _fetch_rules(source, config))
    source = _file_path(source)
    return _file_name(source, config), _file_bytes(source, config)


def has_scheme(source: str) -> bool:
    """Return whether ``source`` is a URL and not a path."""
    return _SCHEME.match(source) is not None


def check_source(source: ImageSource, config: MediaConfig) -> None:
    """Check an image as far as possible without reading it; pixels in memory are not looked at.

    A file must be regular, readable, below the allowed folder and not too large. The host of a URL
    must be allowed, and is not contacted.

    Raises:
        ImageError: As in ``load_image``, which would raise the same.
    """
    plain = plain_source(source, config.max_media_bytes)
    if isinstance(plain, bytes):
        check_bytes(len(plain), config.max_media_bytes, "image bytes")
    elif isinstance(plain, str) and is_url(plain):
        check_url(plain, _fetch_rules(plain, config))
    elif isinstance(plain, str | Path) and not _is_data_uri(plain):
        with _opened(_file_path(plain), config):
            pass


def is_url(source: object) -> bool:
    """Return whether ``source`` names an image that would be downloaded."""
    if not isinstance(source, str) or _is_data_uri(source):
        return False
    scheme = _SCHEME.match(source)
    return scheme is not None and scheme[1].lower() != "file"


def _is_data_uri(source: str | Path) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _file_path(source: str | Path) -> str | Path:
    return file_url_path(source) if isinstance(source, str) and has_scheme(source) else source


def _fetch_rules(url: str, config: MediaConfig) -> FetchRules:
    if not config.allowed_media_hosts:
        raise MediaNotAllowedError(
            f"image: must be a local file or a data URI, got the address {scheme_and_host(url)!r} "
            "and no allowed host (allowed_media_hosts, --allow-host)"
        )
    return FetchRules(
        hosts=config.allowed_media_hosts,
        allow_http=config.allow_http,
        max_bytes=config.max_media_bytes,
        seconds=config.media_timeout,
        network=config.network,
    )


def _file_bytes(source: str | Path, config: MediaConfig) -> bytes:
    with _opened(source, config) as (file, size):
        most = config.max_media_bytes
        # Python allocates what it is asked for: `most` at once would cost half a millisecond
        data = file.read(min(size + 1, most))
        return data if len(data) <= size else data + file.read(most - len(data))


@contextmanager
def _opened(source: str | Path, config: MediaConfig) -> Iterator[tuple[IO[bytes], int]]:
    """Open a regular file, and yield it with its size in bytes.

    Symbolic links are resolved before the allowed folder is checked.

    Raises:
        MediaNotAllowedError: The file is outside the allowed folder.
        ImageError: The file cannot be read, is not regular, or is too large.
    """
    try:
        path = Path(source).resolve()
        if config.allowed_media_root is not None and not path.is_relative_to(
            config.allowed_media_root.resolve()
        ):
            name = _file_name(source, config)
            raise MediaNotAllowedError(f"{name}: must lie below the allowed folder")
        # A pipe or a device could block the call, so it is opened without waiting and then rejected
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        with open(path, "rb", opener=lambda at, _flags: os.open(at, flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _unreadable(source, config, "it is no regular file")
            if status.st_size > config.max_media_bytes:
                check_bytes(status.st_size, config.max_media_bytes, _file_name(source, config))
            yield file, status.st_size
    except ImageError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else "the system refuses"
        raise _unreadable(source, config, reason) from None
    except (ValueError, RuntimeError):
        # A null character raises ValueError, a loop of links RuntimeError
        raise _unreadable(source, config, "no such name") from None


def _unreadable(source: str | Path, config: MediaConfig, reason: str) -> ImageError:
    return ImageError(f"{_file_name(source, config)}: cannot be read as an image: {reason}")


def _file_name(source: str | Path, config: MediaConfig) -> str:
    """Return what messages call a file.

    Where a folder is allowed, a file in it is called by its path there, and one that is elsewhere
    by its last part.
    """
    root = config.allowed_media_root
    if root is None:
        return _shortened(str(source))
    path = Path(os.path.normpath(source))
    if not path.is_absolute() and path.parts[:1] != ("..",):
        return _shortened(str(path))
    for folder in _spellings(root):
        if path.is_relative_to(folder):
            return _shortened(str(path.relative_to(folder)))
    return _shortened(path.name)


def _spellings(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder.absolute()
    yield folder.resolve()


def _shortened(text: str) -> str:
    """Return at most 120 characters, because a caller may pass a whole file as a name."""
    return text if len(text) <= 120 else text[:117] + "…"
