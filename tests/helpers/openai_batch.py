"""OpenAI's public format of a batch's results, in which no other field is allowed."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TokenLogprob(Strict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class Logprobs(Strict):
    content: list[ChosenTokenLogprob] | None
    refusal: list[ChosenTokenLogprob] | None


class Message(Strict):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(Strict):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class Usage(Strict):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class ChatCompletion(Strict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ApiError(Strict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Strict):
    error: ApiError


class Response(Strict):
    status_code: int
    request_id: str
    body: ChatCompletion | ErrorBody


class BatchError(Strict):
    code: str
    message: str


class BatchResult(Strict):
    id: str
    custom_id: str
    response: Response
    error: BatchError | None
