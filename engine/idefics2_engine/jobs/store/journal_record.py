r"""The line of one finished row in the journal.

A record is ``{"v":1,"row":17,"key":"<sha256>","out":{…},"crc":"xxxxxxxx"}`` and ``\n``, without
other spaces, in this order. ``row`` is decimal without leading zeros, ``key`` has 64 lower-case hex
digits, and ``out`` is an object on one line. ``crc`` is the CRC-32 of zip and Ethernet
(``zlib.crc32``), 8 lower-case hex digits, of all bytes from the first ``{`` to the last byte of
``out``, which is the one in front of ``,"crc"``.
"""

import re
from binascii import unhexlify
from typing import NamedTuple
from zlib import crc32

# The index has 32 bits for both, and one value for none
MOST_ROWS = (1 << 32) - 1
MOST_BYTES = (1 << 32) - 1

_START = b'{"v":1,"row":'
_RECORD = re.compile(rb'\{"v":1,"row":(0|[1-9]\d{0,9}),"key":"([0-9a-f]{64})","out":(?=\{)')
_END = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n\Z')
_END_BYTES = len(b',"crc":"xxxxxxxx"}\n')
_KEY = re.compile(r"[0-9a-f]{64}")


class Record(NamedTuple):
    """A row of the journal; ``start`` is where its record begins in the line it was read from."""

    row: int
    key: bytes
    out: bytes
    start: int


class RecordSpan(NamedTuple):
    """A record in a line; ``start`` is where it begins, and ``begin`` where its output does."""

    row: int
    key: bytes
    begin: int
    start: int


def check_key(key: str) -> bytes:
    """Return the 32 bytes of a key.

    Raises:
        ValueError: It is not a SHA-256 in lower-case hex digits.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"key must have 64 lower-case hex digits, got {key!r:.80}")
    return bytes.fromhex(key)


def encode_record(row: int, key: str, out: bytes) -> bytes:
    """Return the record of ``row``, whose output is the JSON object ``out``.

    Raises:
        ValueError: ``row`` or ``key`` is out of bounds, or ``out`` is not an object on one line.
    """
    if not 0 <= row < MOST_ROWS:
        raise ValueError(f"row must be from 0 to {MOST_ROWS - 1}, got {row}")
    check_key(key)
    if not (out.startswith(b"{") and out.endswith(b"}")) or b"\n" in out:
        raise ValueError("out must be a JSON object on one line")
    body = b'%b%d,"key":"%b","out":%b' % (_START, row, key.encode(), out)
    if len(body) + _END_BYTES > MOST_BYTES:
        raise ValueError(f"out must have at most {MOST_BYTES} bytes, got {len(out)}")
    return b'%b,"crc":"%08x"}\n' % (body, crc32(body))


def decode_record(line: bytes) -> Record | None:
    r"""Return the record that ends ``line``, which ends with ``\n``, or ``None`` if it is damaged.

    Damage in a newline joins two lines, and costs only the first of them: what is in front of a
    good record is ignored. Inside of a record ``out`` cannot be mistaken for one, because the sum
    of the outer record is at its end.
    """
    span = find_record(line)
    if span is None:
        return None
    return Record(span.row, span.key, line[span.begin : len(line) - _END_BYTES], span.start)


def find_record(line: bytes) -> RecordSpan | None:
    """Return where the record is that ``decode_record`` returns, without a copy of its output."""
    last = len(line) - _END_BYTES
    end = _END.match(line, last) if last >= 0 else None
    if end is None:
        return None
    crc = int(end[1], 16)
    start = 0
    while start >= 0:
        head = _RECORD.match(line, start)
        if (
            head is not None
            and crc32(memoryview(line)[start:last]) == crc
            and (row := int(head[1])) < MOST_ROWS
        ):
            return RecordSpan(row, unhexlify(head[2]), head.end(), start)
        start = line.find(_START, start + 1)
    return None
