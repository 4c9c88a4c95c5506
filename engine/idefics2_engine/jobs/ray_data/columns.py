"""Rows of a Ray dataset: engine's inputs from columns, and columns from the engine's outputs.

Only Arrow types are in the columns. Inputs that ``preprocess`` returns may have any shape, which
Arrow could not hold in one column, so they travel in one binary column.
"""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from idefics2_engine.errors import Idefics2Error, PromptError, SamplingError, short_repr
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.outputs import RequestOutput, TokenLogprobs
from idefics2_engine.row import Conversation, Prompt, Row
from idefics2_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import pyarrow as pa

# Columns that the engine reads
INPUTS = ("messages", "prompt", "image", "sampling_params")
# The binary column with the inputs of a row, between preprocess and postprocess
PACKED = "__idefics2_inputs"
ERROR = "__inference_error__"
ERROR_CODE = "error_code"


def pack(inputs: Mapping[str, Any]) -> bytes:
    """Return the inputs of one row as bytes.

    Raises:
        PromptError: A value is neither plain data nor bytes, such as a decoded picture.
    """
    import msgpack

    try:
        packed: bytes = msgpack.packb(inputs, default=_plain, unicode_errors="surrogatepass")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PromptError(f"row: must be plain data and bytes, got {error}") from None
    return packed


def unpack(packed: bytes) -> dict[str, Any]:
    """Return the inputs of one row. Tuples have become lists, and paths text."""
    import msgpack

    inputs: dict[str, Any] = msgpack.unpackb(
        packed, strict_map_key=False, unicode_errors="surrogatepass"
    )
    return inputs


def pack_error(error: Idefics2Error) -> bytes:
    """Return the error of inputs that cannot be packed, in place of them."""
    return pack({"error": str(error)})


def row_inputs(table: "pa.Table") -> list[dict[str, Any]]:
    """Return the inputs of each row, with ``id`` if there is one.

    Messages that ``preprocess`` made replace a prompt and images of the dataset, and a prompt that
    it made replaces messages.
    """
    names = [name for name in (*INPUTS, "id", PACKED) if name in table.column_names]
    rows: list[dict[str, Any]] = table.select(names).to_pylist()
    if PACKED in names:
        rows = [_replaced(row, unpack(row.pop(PACKED))) for row in rows]
    return rows


def _replaced(row: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    others = {"messages": ("prompt", "image"), "prompt": ("messages",)}
    unused = {other for name in made for other in others.get(name, ())}
    return {name: value for name, value in row.items() if name not in unused} | made


def input_key(inputs: Mapping[str, Any]) -> str:
    """Return a hash of the inputs, which is the same in every process."""
    text = json.dumps(inputs, default=_digest, skipkeys=True)
    return _digest(text.encode())


def to_row(inputs: Mapping[str, Any], key: str) -> Row:
    """Return the row that the engine answers.

    Args:
        inputs: ``messages``, or ``prompt`` with or without ``image``, and ``sampling_params``. Its
            ``id`` is the key of the row, if it is a string or an integer.
        key: Key of a row without such an ``id``.

    Raises:
        PromptError: There is no prompt, or more than one.
        SamplingError: A parameter is invalid, or asks for what no column holds.
    """
    if "error" in inputs:
        raise PromptError(inputs["error"])
    given = {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}
    row_id = inputs.get("id")
    is_key = isinstance(row_id, str | int) and not isinstance(row_id, bool)
    params = _sampling_params(given.pop("sampling_params", {}))
    return Row(row_id if is_key else key, _prompt(given), params)  # type: ignore[arg-type]


def to_answer(output: RequestOutput) -> dict[str, Any]:
    """Return the output columns of an answered row."""
    answer = output.outputs[0]
    metrics = output.metrics
    return {
        "prompt": _text(output.prompt),
        "prompt_token_ids": output.prompt_token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_text": _text(answer.text),
        "generated_tokens": answer.token_ids,
        "num_generated_tokens": len(answer.token_ids),
        "logprobs": None if answer.logprobs is None else list(map(_logprobs, answer.logprobs)),
        "metrics": {
            "arrival_time": metrics.arrival_time,
            "first_token_time": metrics.first_token_time,
            "finished_time": metrics.finished_time,
        },
        ERROR: "",
        ERROR_CODE: "",
    }


def to_error(error: Idefics2Error) -> dict[str, Any]:
    """Return the output columns of a row without an answer."""
    row_error = row_error_of(error)
    return {
        "prompt": "",
        "prompt_token_ids": [],
        "num_input_tokens": 0,
        "generated_text": "",
        "generated_tokens": [],
        "num_generated_tokens": 0,
        "logprobs": None,
        "metrics": None,
        ERROR: row_error.message or row_error.code,
        ERROR_CODE: row_error.code,
    }


def with_outputs(table: "pa.Table", answers: Iterable[Mapping[str, Any]]) -> "pa.Table":
    """Return ``table`` with the output columns. They replace input columns of the same name."""
    import pyarrow as pa

    schema = output_schema()
    outputs = pa.Table.from_pylist(list(answers), schema=schema)
    table = table.drop_columns([name for name in schema.names if name in table.column_names])
    for name in schema.names:
        table = table.append_column(schema.field(name), outputs.column(name))
    return table


def output_schema() -> "pa.Schema":
    """Return names and types of the output columns."""
    import pyarrow as pa

    tokens = pa.list_(pa.int64())
    logprob = pa.struct(
        {
            "token_id": pa.int64(),
            "logprob": pa.float64(),
            "rank": pa.int64(),
            "decoded_token": pa.string(),
        }
    )
    times = ("arrival_time", "first_token_time", "finished_time")
    return pa.schema(
        {
            "prompt": pa.string(),
            "prompt_token_ids": tokens,
            "num_input_tokens": pa.int64(),
            "generated_text": pa.string(),
            "generated_tokens": tokens,
            "num_generated_tokens": pa.int64(),
            "logprobs": pa.list_(pa.list_(logprob)),
            "metrics": pa.struct({name: pa.float64() for name in times}),
            ERROR: pa.string(),
            ERROR_CODE: pa.string(),
        }
    )


def _prompt(given: Mapping[str, Any]) -> Prompt | Conversation:
    match given:
        case {"messages": list(messages), **rest} if not rest:
            return messages
        case {"prompt": str(prompt), **rest} if rest.keys() <= {"image"}:
            media = {"image": rest["image"]} if rest else {}
            return {"prompt": prompt, "multi_modal_data": media}
    raise PromptError(
        "row: must have 'messages', a list, or 'prompt', text, with or without 'image', "
        f"got {short_repr(sorted(given))}"
    )


def _sampling_params(values: Any) -> SamplingParams:
    # Arrow gives every row every key that a row of the column has
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if value is not None}
    params = SamplingParams.from_dict(values)
    if params.n != 1 or params.prompt_logprobs is not None:
        raise SamplingError(
            "n must be 1 and prompt_logprobs None, because no column holds more, "
            f"got {params.n} and {params.prompt_logprobs}"
        )
    return params


def _logprobs(position: TokenLogprobs) -> list[dict[str, Any]]:
    """Return the entries of one position: first that of the token itself."""
    return [
        {
            "token_id": token,
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": _text(entry.decoded_token),
        }
        for token, entry in position.items()
    ]


def _plain(value: Any) -> Any:
    """Convert what data frames and paths bring, for ``msgpack``."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == ():
        return value.item()
    if str(getattr(value, "dtype", "")) == "object":
        return value.tolist()
    advice = "; a picture must be the bytes of its file, a path or a URL"
    raise TypeError(f"a value of type {type(value).__name__}{advice}")


def _digest(value: Any) -> str:
    data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
    return blake2b(data, digest_size=16).hexdigest()


def _text(value: str) -> str:
    r"""Return text that Arrow can hold. Halves of surrogate pairs are written as ``\udxxx``."""
    return value.encode("utf-8", "backslashreplace").decode()
