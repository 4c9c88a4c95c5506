"""Messages between the engine and its worker processes: a JSON object and bytes.

Neither side unpickles what the other sent, so a worker that a malicious file has taken over cannot
run code in the engine's process.
"""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

_SIZES = struct.Struct("<II")
# Most replies arrive in one read, each of which gives Python's lock away
_FIRST_READ = 1 << 16


def send(connection: socket.socket, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send one message; raise ``ConnectionError`` if the other side has ended."""
    text = json.dumps(header).encode()
    connection.sendall(_SIZES.pack(len(text), len(payload)) + text)
    if payload:
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Return the next message, or ``None`` if the other side has ended.

    The sides take turns, so all that arrives is of this message.
    """
    try:
        data = connection.recv(_FIRST_READ)
        while 0 < len(data) < _SIZES.size:
            data = _joined(data, connection.recv(_FIRST_READ))
        if not data:
            return None
        text_size, payload_size = _SIZES.unpack_from(data)
        message = bytearray(_SIZES.size + text_size + payload_size)
        message[: len(data)] = data
        rest = memoryview(message)[len(data) :]
        while rest:
            count = connection.recv_into(rest)
            if not count:
                return None
            rest = rest[count:]
    except ConnectionError:
        return None
    text_end = _SIZES.size + text_size
    header: dict[str, Any] = json.loads(message[_SIZES.size : text_end])
    return header, bytes(memoryview(message)[text_end:])


def _joined(data: bytes, more: bytes) -> bytes:
    """Return both parts; nothing if there were no more."""
    return data + more if more else b""
