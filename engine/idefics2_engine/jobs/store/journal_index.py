"""Where the records of each row are in the journal, in arrays of 32 bytes a record."""

from array import array

# A record begins before the end of a segment, so that 32 bits are enough for its offset
SEGMENT_BITS = 32
# Nobody finds two inputs whose SHA-256 begin with the same 16 bytes
_KEY_BYTES = 16
_NONE = 0


class JournalIndex:
    """Finds the last record of a row with a given key.

    A record has a number, from 0. The records of a row are a chain from the last one to the first.
    The first half of a key stands for it.
    """

    def __init__(self) -> None:
        # These are 0 for none, otherwise a number plus 1
        self._last_of_row = array("I")
        self._before = array("I")
        self._places = array("Q")
        self._lengths = array("I")
        self._keys = bytearray()
        self.num_rows = 0

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._places)

    def first_missing(self) -> int:
        """Return the first row without a record."""
        try:
            return self._last_of_row.index(_NONE)
        except ValueError:
            return len(self._last_of_row)

    def add(self, row: int, key: bytes, segment: int, offset: int, length: int) -> int:
        """Add the newest record; return its number."""
        if row >= len(self._last_of_row):
            self._last_of_row.frombytes(bytes(4 * (row + 1 - len(self._last_of_row))))
        before = self._last_of_row[row]
        self.num_rows += before == _NONE
        self._before.append(before)
        self._keys += key[:_KEY_BYTES]
        self._lengths.append(length)
        self._places.append(segment << SEGMENT_BITS | offset)
        # At the end, so that another thread finds no record that is incomplete
        self._last_of_row[row] = len(self._places)
        return len(self._places) - 1

    def find(self, row: int, key: bytes) -> int | None:
        """Return the number of the newest record of ``row`` with ``key``, if there is one."""
        found = self._last_of_row[row] if row < len(self._last_of_row) else _NONE
        while found != _NONE and not self._keys.startswith(
            key[:_KEY_BYTES], (found - 1) * _KEY_BYTES
        ):
            found = self._before[found - 1]
        return None if found == _NONE else found - 1

    def records(self, row: int) -> list[int]:
        """Return the numbers of all records of ``row``, the newest first."""
        found = self._last_of_row[row] if row < len(self._last_of_row) else _NONE
        numbers = []
        while found != _NONE:
            numbers.append(found - 1)
            found = self._before[found - 1]
        return numbers

    def half_key(self, record: int) -> bytes:
        """Return the first half of the key of the record of this number."""
        return bytes(self._keys[record * _KEY_BYTES : (record + 1) * _KEY_BYTES])

    def place(self, record: int) -> tuple[int, int, int]:
        """Return segment, offset and length in bytes of the record of this number."""
        segment, offset = divmod(self._places[record], 1 << SEGMENT_BITS)
        return segment, offset, self._lengths[record]
