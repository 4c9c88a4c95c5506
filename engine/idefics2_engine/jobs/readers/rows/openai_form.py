"""Lines of OpenAI's batch format."""

from collections.abc import Mapping
from typing import Any

from idefics2_engine.errors import short_repr
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.json_line import json_type
from idefics2_engine.jobs.readers.rows.row_content import RowContent, conversation
from idefics2_engine.jobs.readers.rows.row_images import RowImages

_METHOD = "POST"
_URL = "/v1/chat/completions"
# These have the names of ``SamplingParams``
_SAME_NAMES = frozenset(
    [
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "max_tokens",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
    ]
)
_OTHERS = frozenset(
    [
        "messages",
        "model",
        "stream",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "response_format",
    ]
)
_MOST_LOGPROBS = 20


class OpenAIForm:
    """Reads ``{"custom_id": …, "method": "POST", "url": …, "body": {…}}``.

    A key whose value is null counts as missing.

    Args:
        options: The columns that are kept, and the model that lines must name.
        images: Reads images.
    """

    id_column = "custom_id"
    needs_id = False

    def __init__(self, options: InputOptions, images: RowImages) -> None:
        self._images = images
        self._model = options.check_model
        self._known = {"custom_id", "method", "url", "body", *options.keep}

    def read(self, columns: Mapping[str, Any]) -> RowContent:
        """Return the content of a line.

        Raises:
            BadRowError: The line has another shape, or a key that is not honored.
        """
        _check_keys(columns, self._known, "line")
        if columns.get("method") != _METHOD:
            raise BadRowError(
                "schema", f"method must be {_METHOD!r}, got {short_repr(columns.get('method'))}"
            )
        if columns.get("url") != _URL:
            # A message has no absolute path, of which this has the form
            raise BadRowError("schema", f"url must be {_URL[1:]} after a slash, got another one")
        given = columns.get("body")
        if not isinstance(given, Mapping):
            raise BadRowError("schema", f"body must be an object, got {json_type(given)}")
        body = {key: value for key, value in given.items() if value is not None}
        _check_keys(body, _SAME_NAMES | _OTHERS, "body")
        if body.get("stream", False) is not False:
            raise BadRowError(
                "unknown_key", f"body: stream must be false, got {short_repr(body['stream'])}"
            )
        if "messages" not in body:
            raise BadRowError("schema", "body must have 'messages', got none")
        if self._model is not None and body.get("model") != self._model:
            raise BadRowError(
                "schema",
                f"body: model must be {short_repr(self._model)}, got {short_repr(body.get('model'))}",
            )
        return conversation(body["messages"], None, self._images, _sampling(body) or None)


def _check_keys(values: Mapping[str, Any], known: frozenset[str] | set[str], name: str) -> None:
    if not values.keys() <= known:
        for key, value in values.items():
            if key not in known and value is not None:
                raise BadRowError(
                    "unknown_key", f"{name} must have supported keys, got {short_repr(key)}"
                )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in ``body`` by the names of ``SamplingParams``."""
    given = {key: body[key] for key in body.keys() & _SAME_NAMES}
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise BadRowError(
                "sampling", "body must have max_tokens or max_completion_tokens, got both"
            )
        given["max_tokens"] = body["max_completion_tokens"]
    wants, most = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(wants, bool):
        raise BadRowError("sampling", f"logprobs must be true or false, got {short_repr(wants)}")
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= _MOST_LOGPROBS:
        raise BadRowError(
            "sampling",
            f"top_logprobs must be an integer from 0 to {_MOST_LOGPROBS}, got {short_repr(most)}",
        )
    if most and not wants:
        raise BadRowError("sampling", "top_logprobs must come with logprobs, got it alone")
    if wants:
        given["logprobs"] = most
    if "response_format" in body and (constraint := _constraint(body["response_format"])):
        given["structured_outputs"] = constraint
    return given


def _constraint(given: Any) -> dict[str, Any] | None:
    """Return what ``response_format`` asks for, by the names of ``StructuredOutputsParams``."""
    if not isinstance(given, Mapping):
        raise BadRowError("schema", f"response_format must be an object, got {json_type(given)}")
    kind = given.get("type")
    if kind == "json_schema":
        _check_keys(given, {"type", "json_schema"}, "response_format")
        schema = given.get("json_schema")
        if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
            raise BadRowError(
                "sampling", "response_format must have an object at json_schema.schema, got none"
            )
        # An answer always follows the schema, also where that is not asked for
        _check_keys(schema, {"name", "description", "schema", "strict"}, "json_schema")
        return {"json": schema["schema"]}
    _check_keys(given, {"type"}, "response_format")
    if kind == "json_object":
        return {"json_object": True}
    if kind != "text":
        raise BadRowError(
            "sampling",
            "response_format must have a type of text, json_object or json_schema, "
            f"got {short_repr(kind)}",
        )
    return None
