"""The JSON object of a row: its answers or its error, as the journal stores it.

The keys are ``id``, ``row``, ``outputs``, ``usage``, ``error`` and ``keep``, in this order, and
then those of ``SaveOptions`` that were asked for. Nothing in it depends on when, where or beside
which other rows the row was answered.
"""

from dataclasses import dataclass, fields
from json.encoder import encode_basestring as _quoted
from math import isfinite, isnan
from typing import Self

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.store.canonical_json import row_bytes, row_text
from idefics2_engine.outputs import CompletionOutput, RequestOutput
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


def encode_answer(
    row: JobRow, output: RequestOutput, save: SaveOptions, error: RowError | None = None
) -> bytes:
    """Return the JSON object of an answered row, which is an error row if there is an ``error``.

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
    return _encode(row, answers, usage, error, saved)


def encode_error(row: JobRow, error: RowError) -> bytes:
    """Return the JSON object of a row without an answer; raise as ``encode_answer`` does."""
    return _encode(row, [], None, error, {})


def _encode(
    row: JobRow,
    answers: list[str],
    usage: dict[str, int] | None,
    error: RowError | None,
    saved: dict[str, object],
) -> bytes:
    head = row_text({"id": row.id, "row": row.number})
    rest = row_text(
        {
            "usage": usage,
            "error": None if error is None else error._asdict(),
            "keep": dict(row.keep),
            **saved,
        }
    )
    return row_bytes(f'{head[:-1]},"outputs":[{",".join(answers)}],{rest[1:]}')


def _answer(answer: CompletionOutput, save: SaveOptions, top: int) -> str:
    """Return the JSON of an answer."""
    parts = [f'{{"text":{_quoted(answer.text)}']
    if save.token_ids:
        parts.append(f'"token_ids":[{",".join(map(str, answer.token_ids))}]')
    if save.logprobs:
        parts.append(f'"logprobs":{_logprobs(answer, top)}')
    reasons = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    return ",".join([*parts, row_text(reasons)[1:]])


def _logprobs(answer: CompletionOutput, top: int) -> str:
    """Return the JSON of log probabilities: of each token, and of the ``top`` likeliest ones.

    An answer has thousands of them, so they are written without a dict for each.
    """
    if answer.logprobs is None:
        return "null"
    places = []
    for token_id, place in zip(answer.token_ids, answer.logprobs, strict=True):
        own, likeliest = "", []
        for other, one in place.items():
            rank, logprob = one.rank, one.logprob
            token = (
                f'{{"token_id":{other},"token":{_quoted(one.decoded_token)},'
                f'"logprob":{logprob if isfinite(logprob) else _null(logprob)},"rank":{rank}'
            )
            if other == token_id:
                own = token
            if rank <= top:
                likeliest.append((rank, other, token))
        assert own, "the token of a position is among its tokens"
        likeliest.sort()
        tops = ",".join([f"{token}}}" for _, _, token in likeliest])
        places.append(f'{own},"top":[{tops}]}}')
    return f"[{','.join(places)}]"


def _null(logprob: float) -> str:
    """Return what stands for an infinite number, which JSON does not have."""
    if isnan(logprob):
        raise ValueError("a log probability must be a number, got nan")
    return "null"


def _image_info(info: ImageInfo) -> dict[str, object]:
    return {
        "sha256": info.sha256,
        "size": [info.width, info.height],
        "mode": info.mode,
        "format": info.format,
        "orientation": info.orientation,
        "warnings": list(info.warnings),
    }
