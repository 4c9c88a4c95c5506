"""Rows as a Parquet file, whose columns are fixed before the first row.

Columns are those of the JSON object, with three differences, because a column has one type:

- ``id`` is text, also if it is a number.
- ``stop_reason`` of an answer is the stop string. A stop token is in ``stop_token_id``.
- ``keep`` is the text of its JSON object, whatever its columns have.

A row group ends after a number of rows or of bytes of JSON, so it depends on the rows alone.
"""

import io
import json
from typing import Any

from idefics2_engine.jobs.optional_libraries import import_extra
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.jobs.writers.output_file import OutputFile
from idefics2_engine.jobs.writers.row_output import SaveOptions

GROUP_ROWS = 4096
GROUP_BYTES = 16 << 20


class ParquetFormat:
    """Collects rows and writes them in row groups.

    Args:
        file: The output.
        save: What the rows have besides text.
        group_rows: Most rows of a row group.
        group_bytes: A row group ends when its rows have so many bytes of JSON.

    Raises:
        ConfigError: ``pyarrow`` is not installed.
    """

    def __init__(
        self,
        file: OutputFile,
        save: SaveOptions,
        *,
        group_rows: int = GROUP_ROWS,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        parquet = import_extra("pyarrow.parquet", "parquet")
        self._arrow = import_extra("pyarrow", "parquet")
        self._file = file
        self._group_rows = group_rows
        self._group_bytes = group_bytes
        self._schema = parquet_schema(save)
        # An error of the file, which is raised where Arrow is not on the stack, stays as it is
        self._pending = _Pending()
        self._writer = parquet.ParquetWriter(self._pending, self._schema, compression="zstd")
        self._rows: list[bytes] = []
        self._num_bytes = 0

    def write_row(self, row: bytes) -> None:
        """Write a row, or keep it for its row group."""
        self._rows.append(row)
        self._num_bytes += len(row)
        if len(self._rows) == self._group_rows or self._num_bytes >= self._group_bytes:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the footer."""
        if self._rows:
            self._write_group()
        self._writer.close()
        self._file.write(self._pending.take())

    def _write_group(self) -> None:
        rows, self._rows, self._num_bytes = self._rows, [], 0
        columns = [_columns(row) for row in rows]
        table = self._arrow.Table.from_pylist(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(rows))
        self._file.write(self._pending.take())


def parquet_schema(save: SaveOptions) -> Any:
    """Return the ``pyarrow.Schema`` of an output.

    Raises:
        ConfigError: ``pyarrow`` is not installed.
    """
    pa = import_extra("pyarrow", "parquet")
    text, number = pa.string(), pa.int64()
    token = {"token_id": number, "token": text, "logprob": pa.float64(), "rank": number}
    place = pa.struct({**token, "top": pa.list_(pa.struct(token))})
    answer = {"text": text}
    if save.token_ids:
        answer["token_ids"] = pa.list_(number)
    if save.logprobs:
        answer["logprobs"] = pa.list_(place)
    answer |= {"finish_reason": text, "stop_reason": text, "stop_token_id": number}
    counts = ("prompt_tokens", "image_tokens", "images", "completion_tokens")
    columns = {
        "id": text,
        "row": number,
        "outputs": pa.list_(pa.struct(answer)),
        "usage": pa.struct(dict.fromkeys(counts, number)),
        "error": pa.struct(dict.fromkeys(("code", "stage", "message"), text)),
        "keep": text,
    }
    if save.prompt:
        columns["prompt"] = text
    if save.image_info:
        info = {"sha256": text, "size": pa.list_(number), "mode": text, "format": text}
        info |= {"orientation": number, "warnings": pa.list_(text)}
        columns["image_info"] = pa.list_(pa.struct(info))
    return pa.schema(columns)


class _Pending(io.RawIOBase):
    """What Arrow has written and the output does not have yet."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._size += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._size

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _columns(encoded: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(encoded)
    row["keep"] = encode_row(row["keep"]).decode()
    # Only the escape of a surrogate, which UTF-8 cannot encode, begins so
    if rb"\ud" in encoded:
        row = _without_surrogates(row)
    row["id"] = str(row["id"])
    for answer in row["outputs"]:
        reason = answer["stop_reason"]
        if isinstance(reason, int):
            answer |= {"stop_reason": None, "stop_token_id": reason}
    return row


def _without_surrogates(value: Any) -> Any:
    r"""Return ``value`` with each surrogate in its texts as ``\udxxx``."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(one) for key, one in value.items()}
    return value
