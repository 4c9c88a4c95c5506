"""URLs: allowed addresses and hostile servers, all against a server in this process."""

import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest

from idefics2_engine.errors import ImageError, MediaFetchError, MediaNotAllowedError
from idefics2_engine.images.loader import MediaConfig, load_image
from idefics2_engine.images.sources.download import FetchRules, Network, check_url, fetch
from pictures import file, noise

# A global address. Connections to it are redirected to the server of the test.
PUBLIC = "93.184.216.34"
Behavior = Callable[[socket.socket, str], None]


def answer(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    given = {"Content_Length": len(body), **headers}
    lines = [
        f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value is not None
    ]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


@dataclass
class Server:
    """A server that answers each request with the entry of ``paths``, and records the requests."""

    paths: dict[str, bytes | Behavior] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        try:
            with self.tls.wrap_socket(client, server_side=True) if self.tls else client as peer:
                request = b""
                while b"\r\n\r\n" not in request and (got := peer.recv(4096)):
                    request += got
                self.requests.append(request.decode())
                path = request.split(b" ")[1].decode()
                found = self.paths.get(path, answer(b"", "404 Not Found"))
                if isinstance(found, bytes):
                    peer.sendall(found)
                else:
                    found(peer, path)
        except (OSError, IndexError):
            # The client closed the connection, as it should
            pass

    def wait(self, seconds: float) -> bool:
        return self._over.wait(seconds)

    def close(self) -> None:
        self._over.set()
        self._listener.close()

    def _resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror
        return self.names[host]

    def _connect(self, address: str, port: int, timeout: float) -> socket.socket:
        self.connected.append((address, port))
        return socket.create_connection(self._listener.getsockname(), timeout)

    @property
    def network(self) -> Network:
        return Network(self._resolve, self._connect, self.client_tls)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server(names={"pictures.example": [PUBLIC], "other.example": [PUBLIC]})
    yield one
    one.close()


def rules(server: Server, **changes: Any) -> FetchRules:
    plain = FetchRules(("pictures.example",), True, 1 << 20, 3600.0, server.network)
    return replace(plain, **changes)


URL = "http://pictures.example"


def test_image_of_an_allowed_host_is_downloaded(server: Server) -> None:
    picture = noise(9, 8)
    server.paths["/a.png?key=1"] = answer(file(picture, "PNG"))
    config = MediaConfig(
        allowed_media_hosts=("pictures.example",), allow_http=True, network=server.network
    )
    got = load_image(f"{URL}/a.png?key=1", config)
    np.testing.assert_array_equal(np.array(got), np.array(picture))
    assert server.resolved == ["pictures.example"]
    assert server.connected == [(PUBLIC, 80)]
    (request,) = server.requests
    assert request.startswith("GET /a.png?key=1 HTTP/1.1\r\nHost: pictures.example\r\n")
    assert "cookie" not in request.lower()
    assert "authorization" not in request.lower()


def test_chunked_bodies_and_bodies_without_length_are_read(server: Server) -> None:
    server.paths["/chunks"] = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    server.paths["/close"] = b"HTTP/1.0 200 OK\r\n\r\nabc"
    server.paths["/odd"] = answer(b"abc", Content_Length="x")
    assert fetch(f"{URL}/chunks", rules(server)) == b"abcde"
    assert fetch(f"{URL}/close", rules(server)) == b"abc"
    assert fetch(f"{URL}/odd", rules(server)) == b"abc"


def test_nothing_is_fetched_by_default() -> None:
    with pytest.raises(MediaNotAllowedError, match="no allowed host") as caught:
        load_image("https://pictures.example/a.png")
    assert caught.value.code == "media_not_allowed"
    assert isinstance(caught.value, ImageError)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://pictures.example/a", "must begin with https://, got 'http'"),
        ("file:///etc/passwd", "must begin with https://, got 'file'"),
        ("ftp://pictures.example/a", "must begin with https://"),
        ("gopher://pictures.example:70/_x", "must begin with https://"),
        ("https://elsewhere.example/a", "host 'elsewhere.example' is not allowed"),
        ("https://pictures.example.evil.example/a", "is not allowed"),
        ("https://evilpictures.example/a", "is not allowed"),
        ("https://sub.pictures.example/a", "is not allowed"),
        ("https://pictures.example:8443/a", "is not allowed at port 8443"),
        ("https://pictures.example:22/a", "is not allowed at port 22"),
        ("https://pictures.example:99999/a", "a host and a port that can be read"),
        ("https://pictures.example:x/a", "a host and a port that can be read"),
        ("https://pictures.example@127.0.0.1/a", "must not hold a user or password"),
        ("https://user:word@pictures.example/a", "must not hold a user or password"),
        ("https://127.0.0.1\\@pictures.example/a", "without spaces, controls and backslashes"),
        ("https://pictures.example\\.evil.example/", "without spaces, controls and backslashes"),
        ("https://pictures.example/a b", "without spaces"),
        ("https://pictures.example/a\r\nHost: evil", "without spaces, controls"),
        ("https://pictures.example/\t", "without spaces, controls"),
        ("https://pictures\u3002example/a", "must be ASCII"),
        ("https://pictur\u0435s.example/a", "must be ASCII"),
        ("https:///a", "must name a host"),
        # TLS cannot encode this name
        (f"https://{'a' * 64}.example/a", "must name a host"),
        ("https://[::1/a", "a host and a port that can be read"),
    ],
)
def test_urls_that_are_not_allowed_are_refused(url: str, message: str, server: Server) -> None:
    with pytest.raises(MediaNotAllowedError, match=message):
        fetch(url, rules(server, allow_http=False))
    assert server.resolved == []
    assert server.connected == []


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "127.0.0.1.", "0x7f.1",
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "[::1]", "[::]", "[fe80::1]", "[fd00::1]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[ff02::1]", "[fe80::1%25eth0]",
    ],
)  # fmt: skip
def test_private_addresses_are_refused_if_any_host_is_allowed(host: str, server: Server) -> None:
    network = replace(server.network, resolve=lambda host, port: [host])
    with pytest.raises(MediaNotAllowedError, match=r"global addresses only|must name a host"):
        fetch(f"https://{host}/latest/meta-data/", rules(server, hosts=("*",), network=network))
    assert server.connected == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        [PUBLIC, "10.0.0.1"],
        ["::ffff:192.168.0.1"],
        ["fe80::1%1"],
        [],
    ],
)
def test_names_of_private_addresses_are_refused(addresses: list[str], server: Server) -> None:
    server.names["pictures.example"] = addresses
    with pytest.raises(MediaNotAllowedError, match="must have global addresses only"):
        fetch(f"{URL}/a", rules(server))
    assert server.connected == []


def test_connection_uses_the_address_that_was_checked(server: Server) -> None:
    # DNS rebinding gives another answer the second time
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    network = replace(server.network, resolve=lambda host, port: next(answers))
    server.paths["/a"] = answer(b"x")
    assert fetch(f"{URL}/a", rules(server, network=network)) == b"x"
    assert server.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("pictures.example", "https://PICTURES.example./a", True),
        ("Pictures.Example", "https://pictures.example:443/a", True),
        ("pictures.example:8443", "https://pictures.example:8443/a", True),
        ("pictures.example:8443", "https://pictures.example/a", False),
        (".example", "https://pictures.example/a", True),
        (".example", "https://a.b.example/a", True),
        (".pictures.example", "https://pictures.example/a", False),
        (".pictures.example", "https://evilpictures.example/a", False),
        ("*", "https://anything.example/a", True),
        ("*", "https://anything.example:8080/a", False),
        ("*:8080", "https://anything.example:8080/a", True),
        ("93.184.216.34", "https://93.184.216.34/a", True),
        ("[2606:4700::1111]", "https://[2606:4700:0::1111]/a", True),
        ("2606:4700::1111", "https://[2606:4700::1111]/a", True),
        ("[2606:4700::1111]:81", "https://[2606:4700::1111]:81/a", True),
    ],
)
def test_host_patterns(entry: str, url: str, allowed: bool, server: Server) -> None:
    if allowed:
        check_url(url, rules(server, hosts=(entry,)))
    else:
        with pytest.raises(MediaNotAllowedError, match="is not allowed"):
            check_url(url, rules(server, hosts=(entry,)))


@pytest.mark.parametrize("status", ["301 a", "302 b", "303 c", "307 d", "308 e"])
def test_redirects_are_followed(status: str, server: Server) -> None:
    server.paths["/a"] = answer(b"", status, Location="/b?c")
    server.paths["/b?c"] = answer(b"", status, Location="http://other.example/d")
    server.paths["/d"] = answer(b"found")
    hosts = "pictures.example", "other.example"
    assert fetch(f"{URL}/a", rules(server, hosts=hosts)) == b"found"
    assert server.resolved == ["pictures.example", "pictures.example", "other.example"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "must begin with"),
        ("http://other.example/d", "'other.example' is not allowed"),
        ("http://127.0.0.1/", "'127.0.0.1' is not allowed"),
        ("//169.254.169.254/latest", "'169.254.169.254' is not allowed"),
        ("http://user@pictures.example/", "user or password"),
        ("http://pictures.example:22/", "not allowed at port 22"),
        ("http://pictures.example:99999/", "a host and a port that can be read"),
        ("http://pictur\u00e9s.example/", "must be ASCII"),
        ("http://[fec0::1]/", "'fec0::1' is not allowed"),
    ],
)
def test_redirects_are_checked_like_urls(location: str, message: str, server: Server) -> None:
    server.paths["/a"] = answer(b"", "302 Found", Location=location)
    with pytest.raises(MediaNotAllowedError, match=message):
        fetch(f"{URL}/a", rules(server))
    assert len(server.connected) == 1


def test_redirects_to_private_addresses_are_refused(
    server: Server,
) -> None:
    server.names["inside.example"] = ["10.0.0.7"]
    server.paths["/a"] = answer(b"", "302 Found", Location="http://inside.example/")
    with pytest.raises(MediaNotAllowedError, match=r"'inside.example' must have global addresses"):
        fetch(f"{URL}/a", rules(server, hosts=("*",)))


@pytest.mark.parametrize("location", ["http://[x", "//[", "http://a]/", "http://[1::2::3]/"])
def test_invalid_redirect_is_an_error(location: str, server: Server) -> None:
    server.paths["/a"] = answer(b"", "302 Found", Location=location)
    with pytest.raises(ImageError, match=r"a host and a port|to an address that can be read"):
        fetch(f"{URL}/a", rules(server, hosts=("*",)))


def test_number_of_redirects_is_bounded(server: Server) -> None:
    server.paths["/a"] = answer(b"", "302 Found", Location="/a")
    with pytest.raises(
        MediaFetchError, match=r"http://pictures.example/a: must redirect at most 3"
    ):
        fetch(f"{URL}/a", rules(server))
    assert len(server.requests) == 4


def endless(peer: socket.socket, _path: str) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.sendall(bytes(65536))


def test_body_beyond_the_bound_is_refused(server: Server) -> None:
    server.paths["/a"] = endless
    with pytest.raises(MediaFetchError, match="must have at most 1048576 bytes, got more"):
        fetch(f"{URL}/a", rules(server))
    server.paths["/b"] = answer(b"", Content_Length=1 << 40)
    with pytest.raises(MediaFetchError, match=f"at most 1048576 bytes, got {1 << 40}"):
        fetch(f"{URL}/b", rules(server))


@dataclass
class Drip:
    """A connection that always has one more byte, on a clock that adds a second for each."""

    start: bytes
    then: bytes = b"x"
    now: float = 0.0
    reads: int = 0
    closed: bool = False

    def settimeout(self, seconds: float) -> None:
        assert 0 < seconds <= 100

    def sendall(self, data: bytes) -> None:
        pass

    def recv_into(self, buffer: Any) -> int:
        sent = self.start[self.reads : self.reads + 1] or self.then[: len(buffer)]
        buffer[: len(sent)] = sent
        self.reads += 1
        self.now += 1
        return len(sent)

    def close(self) -> None:
        self.closed = True

    def network(self, server: Server) -> Network:
        connection: Any = self
        return replace(server.network, connect=lambda *_: connection, clock=lambda: self.now)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\n\r\n", b""])
def test_slow_body_ends_at_the_time_limit(start: bytes, server: Server) -> None:
    drip = Drip(start)
    with pytest.raises(MediaFetchError, match=r"must arrive within 100 seconds, and did not"):
        fetch(f"{URL}/a", rules(server, seconds=100, network=drip.network(server)))
    assert drip.reads == 100
    assert drip.closed


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
    ],
)
def test_endless_body_is_read_up_to_the_bound(start: bytes, server: Server) -> None:
    drip = Drip(start, then=bytes(8192))
    network = replace(drip.network(server), clock=lambda: 0.0)
    with pytest.raises(MediaFetchError):
        fetch(f"{URL}/a", rules(server, seconds=100, network=network))
    assert (drip.reads - len(start)) * 8192 < 3 << 20


def test_slow_resolver_ends_at_the_time_limit(server: Server) -> None:
    def hang(host: str, port: int) -> list[str]:
        server.wait(10)
        return [PUBLIC]

    network = replace(server.network, resolve=hang)
    with pytest.raises(MediaFetchError, match=r"within 0.3 seconds"):
        fetch(f"{URL}/a", rules(server, seconds=0.3, network=network))


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (answer(b"abc", Content_Length=9), "must have the 9 bytes it says, got 3"),
        (answer(b"", "404 Not Found"), "must answer with status 200, got 404"),
        (answer(b"", "302 Found"), "must answer with status 200, got 302"),
        (answer(b"", "204 No Content"), "must answer with status 200, got 204"),
        (answer(b"abc", Content_Encoding="gzip"), "must send the file as it is"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 70000, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
    ],
)
def test_broken_answers_are_fetch_errors(response: bytes, message: str, server: Server) -> None:
    server.paths["/a"] = response
    with pytest.raises(MediaFetchError, match=f"http://pictures.example/a: .*{message}") as caught:
        fetch(f"{URL}/a", rules(server))
    assert caught.value.code == "media_fetch"


ODD = (
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 302 x\r\n", b"HTTP/1.1 999 x\r\n"),
    *(b"HTTP/1.1 -5 x\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/2 200\r\n", b"HTTP/1.1 \xb2 x\r\n"),
    *(b"Location: http://[x\r\n", b"Location: //[\r\n", b"Location: \xff\xfe\r\n", b"Location:\r\n"),
    *(b"Location: http://a\0b/\r\n", b"Location: ///\r\n", b"Location: /a\r\n b\r\n"),
    *(b"Location: http://" + b"a" * 70 + b".example/\r\n", b"Location: http://%5b/\r\n"),
    *(b"Location: http://[::1%25x]/\r\n", b"Location: " + b"a" * 60000 + b"\r\n"),
    *(b"Content-Length: -1\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: \xb2\r\n"),
    *(b"Content-Length: " + b"9" * 5000 + b"\r\n", b"Content-Length: 3\r\n", b"Content-Length: 3, 3\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: \xff\r\n"),
    *(b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"3\r\nabc\r\n", b"-1\r\n", b"-5\r\n", b"0\r\n\r\n"),
    *(b"0\r\nX: y\r\n", b"zz\r\n", b"f" * 22 + b"\r\n", b"1;" + b"a" * 70000 + b"\r\n", b"abc"),
    *(bytes(10), b" : x\r\n", b"X\r\n", b":\r\n", b"\xff\xfe: \xff\r\n", b"X: " + b"a" * 70000 + b"\r\n"),
    b"X: a\r\n" * 150,
)  # fmt: skip


def test_random_answers_give_bodies_or_fetch_errors(server: Server) -> None:
    rng = random.Random(0)
    bodies = 0
    for _ in range(400):
        data = bytearray(b"".join((rng.choice(ODD[:3]), *rng.choices(ODD, k=rng.randrange(1, 8)))))
        if rng.random() < 0.3:
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
        server.paths = {"/a": bytes(data), "/": bytes(data)}
        try:
            fetch(f"{URL}/a", rules(server, hosts=("*",)))
            bodies += 1
        except (MediaFetchError, MediaNotAllowedError):
            pass
    assert 40 < bodies < 200


def test_host_without_tls_is_an_error(server: Server) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(answer(b"", "400 Bad Request"))
        network = replace(server.network, connect=lambda *_: ours)
        with pytest.raises(MediaFetchError, match="over TLS with a certificate that holds"):
            fetch("https://pictures.example/a", rules(server, network=network))
    assert ours.fileno() == -1


@pytest.mark.parametrize("seconds", [1e300, 10**400])
def test_long_time_limit_is_accepted(seconds: float, server: Server) -> None:
    server.paths["/a"] = answer(b"x")
    assert fetch(f"{URL}/a", rules(server, seconds=seconds)) == b"x"


def test_error_does_not_show_the_query(server: Server) -> None:
    with pytest.raises(MediaFetchError) as caught:
        fetch(f"{URL}/a?key=secret", rules(server))
    assert "secret" not in str(caught.value)


def test_unknown_names_and_unreachable_hosts_are_errors(server: Server) -> None:
    with pytest.raises(MediaFetchError, match=r"'nowhere.example' cannot be resolved"):
        fetch("http://nowhere.example/a", rules(server, hosts=("*",)))

    def refuse(address: str, port: int, timeout: float) -> socket.socket:
        raise ConnectionRefusedError(f"{address} refused")

    network = replace(server.network, connect=refuse)
    with pytest.raises(MediaFetchError, match="a: cannot be reached") as caught:
        fetch(f"{URL}/a", rules(server, network=network))
    assert PUBLIC not in str(caught.value)


def test_next_address_is_tried(server: Server) -> None:
    server.names["pictures.example"] = ["8.8.8.8", PUBLIC]
    server.paths["/a"] = answer(b"x")

    def connect(address: str, port: int, timeout: float) -> socket.socket:
        if address == "8.8.8.8":
            raise ConnectionRefusedError
        return server.network.connect(address, port, timeout)

    network = replace(server.network, connect=connect)
    assert fetch(f"{URL}/a", rules(server, network=network)) == b"x"


def test_proxies_of_the_environment_are_ignored(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.paths["/a"] = answer(b"x")
    assert fetch(f"{URL}/a", rules(server)) == b"x"


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_certificates_are_checked(server: Server, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pictures.example "
        f"-addext subjectAltName=DNS:pictures.example -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(certificate, key)
    server.paths["/a"] = answer(b"x")
    both = rules(server, hosts=("pictures.example", "other.example"), allow_http=False)
    with pytest.raises(MediaFetchError, match="with a certificate that holds"):
        # No authority has signed the certificate
        fetch("https://pictures.example/a", both)
    server.client_tls = ssl.create_default_context(cafile=certificate)
    trusting = replace(both, network=server.network)
    assert fetch("https://pictures.example/a", trusting) == b"x"
    with pytest.raises(MediaFetchError, match="with a certificate that holds"):
        # The certificate is another host's
        fetch("https://other.example/a", trusting)
