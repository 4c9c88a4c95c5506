"""The JSON object of a row: its answers or its error, as the journal stores it.

The keys are ``id``, ``row``, ``outputs``, ``usage``, ``error`` and ``keep``, in this order, and
then those of ``SaveOptions`` that were asked for. Nothing in it depends on when, where or beside
which other rows the row was answered.
"""

import math
from dataclasses import dataclass, fields
from typing import Self

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.store.canonical_json import encode_row
from idefics2_engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from idefics2_engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class SaveOptions:
    """What the output has besides text.

    Attributes:
        token_ids: Token ids of each answer.
        logprobs: Log probabilities of each answer, as far as its row asks for them.
        prompt: Text of the prompt.
        image_info: What is known of each image.
    """

    token_ids: bool = False
    logprobs: bool = False
    prompt: bool = False
    image_info: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the options of ``--save``, such as ``token_ids,logprobs``.

        Raises:
            ConfigError: A name is unknown.
        """
        known = [field.name for field in fields(cls)]
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise ConfigError(f"--save must list some of {known}, got {short_repr(name)}")
        return cls(**dict.fromkeys(names, True))


def encode_answer(row: JobRow, output: RequestOutput, save: SaveOptions) -> bytes:
    """Return the JSON object of an answered row.

    Raises:
        ValueError: A kept column has a number that is not finite, or a key that is no string.
        TypeError: A kept column has a value that is no JSON.
    """
    usage = {
        "prompt_tokens": len(output.prompt_token_ids),
        "image_tokens": output.num_image_tokens,
        "images": len(output.image_info),
        "completion_tokens": sum(len(answer.token_ids) for answer in output.outputs),
    }
    top = (row.sampling_params or SamplingParams()).logprobs or 0
    answers = [_answer(answer, save, top) for answer in output.outputs]
    saved: dict[str, object] = {}
    if save.prompt:
        saved["prompt"] = output.prompt
    if save.image_info:
        saved["image_info"] = [_image_info(info) for info in output.image_info]
    return _encode(row, answers, usage, None, saved)


def encode_error(row: JobRow, error: RowError) -> bytes:
    """Return the JSON object of a row without an answer; raise as ``encode_answer`` does."""
    return _encode(row, [], None, error, {})


def _encode(
    row: JobRow,
    answers: list[dict[str, object]],
    usage: dict[str, int] | None,
    error: RowError | None,
    saved: dict[str, object],
) -> bytes:
    return encode_row(
        {
            "id": row.id,
            "row": row.number,
            "outputs": answers,
            "usage": usage,
            "error": None if error is None else error._asdict(),
            "keep": dict(row.keep),
            **saved,
        }
    )


def _answer(answer: CompletionOutput, save: SaveOptions, top: int) -> dict[str, object]:
    data: dict[str, object] = {"text": answer.text}
    if save.token_ids:
        data["token_ids"] = answer.token_ids
    if save.logprobs:
        data["logprobs"] = None
        if answer.logprobs is not None:
            places = zip(answer.token_ids, answer.logprobs, strict=True)
            data["logprobs"] = [_place(token_id, place, top) for token_id, place in places]
    return data | {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}


def _place(token_id: int, place: TokenLogprobs, top: int) -> dict[str, object]:
    """Return the generated token of a place, and the ``top`` likeliest ones, of which it may be."""
    tokens = {other: _token(other, one) for other, one in place.items()}
    likeliest = sorted((one.rank, other) for other, one in place.items() if one.rank <= top)
    return {**tokens[token_id], "top": [tokens[other] for _, other in likeliest]}


def _token(token_id: int, one: Logprob) -> dict[str, object]:
    # JSON has no infinity
    logprob = None if math.isinf(one.logprob) else one.logprob
    return {"token_id": token_id, "token": one.decoded_token, "logprob": logprob, "rank": one.rank}


def _image_info(info: ImageInfo) -> dict[str, object]:
    return {
        "sha256": info.sha256,
        "size": [info.width, info.height],
        "mode": info.mode,
        "format": info.format,
        "orientation": info.orientation,
        "warnings": list(info.warnings),
    }
