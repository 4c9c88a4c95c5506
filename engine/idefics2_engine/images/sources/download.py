"""Bounded downloads of images from allowed hosts at public addresses.

A name is resolved once, and all its addresses are checked. The connection is made to a checked
address, so a second DNS answer cannot redirect it. Redirects pass the same checks. Proxies, cookies
and credentials are not used.
"""

import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, RawIOBase
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from idefics2_engine.errors import MediaFetchError, MediaNotAllowedError
from idefics2_engine.images.sources.addresses import is_global

_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
# Bytes of a body that are read at a time
_CHUNK = 65536
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(\.(?!-)[a-z0-9-]{1,63})*")
# Resolvers interpret such a label as a part of an address
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Bound on a time limit in seconds, because sockets refuse much larger ones
_LONGEST = 86400.0
# Bytes of headers that may come with a body. Its chunks may add an eighth of its own bytes.
_MAX_OVERHEAD = 1 << 20


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _connect(address: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((address, port), timeout)


@dataclass(frozen=True)
class Network:
    """The resolver, the connections and the clock of downloads, which tests replace.

    Attributes:
        resolve: Returns the addresses of a host, given the host and a port.
        connect: Opens a connection, given an address, a port and a time limit in seconds.
        tls: Settings of TLS. If ``None``, the system's certificates are trusted.
        clock: Returns a monotonic time in seconds.
    """

    resolve: Callable[[str, int], list[str]] = _resolve
    connect: Callable[[str, int, float], socket.socket] = _connect
    tls: ssl.SSLContext | None = None
    clock: Callable[[], float] = time.monotonic

    def secure(self, raw: socket.socket, host: str) -> socket.socket:
        """Wrap a connection in TLS and check the certificate for ``host``.

        Raises:
            OSError: The handshake fails or the certificate is not valid for ``host``.
        """
        return (self.tls or ssl.create_default_context()).wrap_socket(raw, server_hostname=host)


@dataclass(frozen=True)
class FetchRules:
    """Hosts that images may be fetched from, and limits of a fetch.

    Attributes:
        hosts: ``"name"``, ``"name:port"``, ``".name"`` for all subdomains, or ``"*"`` for any host.
            Without a port, an entry allows ports 443 and 80.
        allow_http: Whether URLs without TLS are allowed.
        max_bytes: Largest size of a body.
        seconds: Longest duration of a fetch, redirects included.
        network: Resolver, connections and clock.
    """

    hosts: tuple[str, ...]
    allow_http: bool
    max_bytes: int
    seconds: float
    network: Network = field(default_factory=Network)


class _Deadline:
    """The time at which a fetch must end."""

    def __init__(self, rules: FetchRules) -> None:
        self._clock = rules.network.clock
        self._end = self._clock() + min(rules.seconds, _LONGEST)

    def remaining(self) -> float:
        """Return the seconds left.

        Raises:
            TimeoutError: There are none.
        """
        seconds = self._end - self._clock()
        if seconds <= 0:
            raise TimeoutError
        return seconds


def fetch(url: str, rules: FetchRules) -> bytes:
    """Return the bytes at ``url``, following redirects.

    Raises:
        MediaNotAllowedError: ``rules`` do not allow the URL or the target of a redirect, or an
            address of the host is not public.
        MediaFetchError: The host cannot be resolved or reached, answers with an error, with too
            many bytes or too slowly, or redirects too often.
    """
    deadline = _Deadline(rules)
    for _ in range(_MAX_REDIRECTS + 1):
        parts = check_url(url, rules)
        found = _get(parts, rules, deadline)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            # urljoin rejects malformed IPv6 addresses
            raise MediaFetchError(
                f"{_short(parts)}: must redirect to an address that can be read"
            ) from None
    raise MediaFetchError(
        f"{_short(parts)}: must redirect at most {_MAX_REDIRECTS} times, got more"
    )


def check_url(url: str, rules: FetchRules) -> SplitResult:
    """Return the parts of a URL if ``rules`` allow it.

    Raises:
        MediaNotAllowedError: The scheme, the host or the port is not allowed, the URL has a user or
            password, or parsers could disagree about it.
    """
    if not url.isascii() or "\\" in url or any(char <= " " or char == "\x7f" for char in url):
        raise MediaNotAllowedError(
            "URL: must be ASCII without spaces, controls and backslashes (percent-encode others)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise MediaNotAllowedError("URL: must have a host and a port that can be read") from None
    schemes = ("https", "http") if rules.allow_http else ("https",)
    if parts.scheme not in schemes:
        raise MediaNotAllowedError(
            f"URL: must begin with {' or '.join(f'{one}://' for one in schemes)}, "
            f"got {parts.scheme[:20]!r}"
        )
    if "@" in parts.netloc:
        raise MediaNotAllowedError("URL: must not hold a user or password")
    host = _host(parts)
    if not any(_covers(entry, host, port or _PORTS[parts.scheme]) for entry in rules.hosts):
        raise MediaNotAllowedError(
            f"URL: host {host[:80]!r} is not allowed"
            + ("" if port is None else f" at port {port}")
            + " (allowed_media_hosts, --allow-host)"
        )
    return parts


def scheme_and_host(url: str) -> str:
    """Return the part of a URL that error messages may show, because others may hold keys."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split(r'[/?#]', rest)[0].rpartition('@')[2]}"[:120]


def _host(parts: SplitResult) -> str:
    """Return the host name in lower case, or the address in its usual spelling.

    Raises:
        MediaNotAllowedError: The host is neither.
    """
    host = (parts.hostname or "").removesuffix(".")
    # An address with a scope is local, so it is refused below
    if ":" in host and "%" not in host:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            host = ""
    labels = host.split(".")
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253 or _NUMBER.fullmatch(labels[-1]):
            raise MediaNotAllowedError(
                "URL: must name a host, or an address as four decimal numbers or in brackets"
            ) from None
    return host


def _covers(entry: str, host: str, port: int) -> bool:
    """Return whether an entry of the allow-list covers a host at a port."""
    name, colon, number = entry.lower().rpartition(":")
    if not colon or not number.isdigit() or (":" in name and not name.endswith("]")):
        name, number = entry.lower(), ""
    if port != int(number or 0) and (number or port not in _PORTS.values()):
        return False
    name = name.removeprefix("[").removesuffix("]")
    return name in ("*", host) or (name.startswith(".") and host.endswith(name))


def _get(parts: SplitResult, rules: FetchRules, deadline: _Deadline) -> bytes | str:
    """Return the body as bytes, or the URL that the server redirects to as text.

    Raises:
        MediaNotAllowedError: An address of the host is not public.
        MediaFetchError: The host cannot be reached, or its answer is an error, too large or late.
    """
    where = _short(parts)
    connection = http.client.HTTPConnection(_host(parts), parts.port or _PORTS[parts.scheme])
    opened = None
    try:
        opened = connection.sock = _open(parts, rules, deadline)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as response:
            if response.status in _REDIRECTS and response.headers.get("Location"):
                return str(response.headers["Location"])
            return _body(response, where, rules.max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, (MediaNotAllowedError, MediaFetchError)):
            raise
        raise MediaFetchError(f"{where}: {_reason(error, rules)}") from None
    finally:
        if opened is not None:
            opened.shut()


def _body(response: http.client.HTTPResponse, where: str, max_bytes: int) -> bytes:
    if response.status != 200:
        raise MediaFetchError(f"{where}: must answer with status 200, got {response.status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaFetchError(f"{where}: must send the file as it is, got a content encoding")
    # The length is None if the server does not send it
    length = response.length
    if length is not None and length > max_bytes:
        raise MediaFetchError(f"{where}: must have at most {max_bytes} bytes, got {length}")
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise MediaFetchError(f"{where}: must have at most {max_bytes} bytes, got more")
    if length is not None and len(body) != length:
        raise MediaFetchError(f"{where}: must have the {length} bytes it says, got {len(body)}")
    return bytes(body)


def _open(parts: SplitResult, rules: FetchRules, deadline: _Deadline) -> "_TimedSocket":
    """Connect to the first of the host's addresses that accepts; all of them must be global."""
    host, port = _host(parts), parts.port or _PORTS[parts.scheme]
    addresses = _resolve_in_time(rules.network, host, port, deadline)
    if not addresses or not all(is_global(address) for address in addresses):
        raise MediaNotAllowedError(f"URL: host {host[:80]!r} must have global addresses only")
    for number, address in enumerate(addresses, 1):
        raw = None
        try:
            raw = rules.network.connect(address, port, deadline.remaining())
            raw.settimeout(deadline.remaining())
            secured = rules.network.secure(raw, host) if parts.scheme == "https" else raw
            return _TimedSocket(secured, deadline, rules.max_bytes)
        except (OSError, ValueError):
            if raw is not None:
                raw.close()
            if number == len(addresses):
                raise
    raise AssertionError("there is at least one address")


def _resolve_in_time(network: Network, host: str, port: int, deadline: _Deadline) -> Sequence[str]:
    """Resolve a host in a thread, because the system's resolver has no time limit."""
    answers: queue.Queue[list[str] | OSError] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(network.resolve(host, port))
        except (OSError, ValueError):
            answers.put(OSError())

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.remaining())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise MediaFetchError(f"URL: host {host[:80]!r} cannot be resolved")
    return answer


def _reason(error: Exception, rules: FetchRules) -> str:
    if isinstance(error, TimeoutError):
        return f"must arrive within {rules.seconds:g} seconds, and did not"
    if isinstance(error, ssl.SSLError):
        return "cannot be reached over TLS with a certificate that holds"
    return "cannot be reached, or does not speak HTTP"


def _short(parts: SplitResult) -> str:
    """Return a URL for error messages, without its query, which may hold keys."""
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:120]


class _TimedSocket:
    """The part of a socket that ``http.client`` uses, with a deadline for all operations."""

    def __init__(self, sock: socket.socket, deadline: _Deadline, max_bytes: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._max_bytes = max_bytes

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.remaining())
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> BufferedReader:
        return BufferedReader(_TimedReader(self._sock, self._deadline, self._max_bytes))

    def close(self) -> None:
        """Do nothing, because ``http.client`` closes the socket before it reads the body."""

    def shut(self) -> None:
        self._sock.close()


class _TimedReader(RawIOBase):
    """A reader with a deadline and a bound on the bytes of a whole response.

    Without the bound, ``http.client`` would read a chunk of -1 bytes to the end, and headers of up
    to 6 MB.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline, max_bytes: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._left = max_bytes + max_bytes // 8 + _MAX_OVERHEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.remaining())
        count = self._sock.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError("more than a body with its headers")
        return count
