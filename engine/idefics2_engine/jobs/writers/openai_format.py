"""Rows as result lines of OpenAI's batch interface."""

import hashlib
import json
from typing import Any

from idefics2_engine.jobs.store.canonical_json import canonical_json, encode_row
from idefics2_engine.jobs.writers.output_file import OutputFormat

# What OpenAI writes for a token that is so unlikely that its logarithm is not finite
_LEAST_LOGPROB = -9999.0


class OpenAiFormat:
    """Converts rows to result lines, which another format writes.

    Args:
        lines: Writes the lines.
        model: The name in ``model``.
        fingerprint: The job's. Ids depend on it.
    """

    def __init__(self, lines: OutputFormat, model: str, fingerprint: str) -> None:
        self._lines = lines
        self._model = model
        self._fingerprint = fingerprint

    def write_row(self, row: bytes) -> None:
        """Write a row, whose log probabilities were saved if it asked for them."""
        self._lines.write_row(encode_row(self._result(json.loads(row))))

    def finish(self) -> None:
        """Finish the lines."""
        self._lines.finish()

    def _result(self, row: dict[str, Any]) -> dict[str, object]:
        custom_id, error = str(row["id"]), row["error"]
        named = canonical_json([custom_id, row["row"], self._fingerprint])
        name = hashlib.sha256(named).hexdigest()[:32]
        if error is None:
            status, body = 200, self._completion(row, name)
        else:
            status = 500 if error["stage"] == "engine" else 400
            error = {"code": error["code"], "message": error["message"]}
            kind = "server_error" if status == 500 else "invalid_request_error"
            body = {"error": {**error, "type": kind, "param": None}}
        return {
            "id": f"batch_req_{name}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": error,
        }

    def _completion(self, row: dict[str, Any], name: str) -> dict[str, object]:
        usage = row["usage"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        return {
            "id": f"chatcmpl-{name}",
            "object": "chat.completion",
            # The time would be another one in each run
            "created": 0,
            "model": self._model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer["text"], "refusal": None},
                    "logprobs": _logprobs(answer.get("logprobs")),
                    "finish_reason": answer["finish_reason"],
                }
                for index, answer in enumerate(row["outputs"])
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }


def _logprobs(places: list[dict[str, Any]] | None) -> dict[str, object] | None:
    if places is None:
        return None
    content = [
        _token(place) | {"top_logprobs": [_token(one) for one in place["top"]]} for place in places
    ]
    return {"content": content, "refusal": None}


def _token(one: dict[str, Any]) -> dict[str, object]:
    text, logprob = one["token"], one["logprob"]
    return {
        "token": text,
        "logprob": _LEAST_LOGPROB if logprob is None else logprob,
        # The bytes of an incomplete character are not known
        "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass")),
    }
