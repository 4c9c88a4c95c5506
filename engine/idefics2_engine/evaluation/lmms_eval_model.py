"""The model ``idefics2_engine`` of lmms-eval: conversations, and the older tasks of its simple models.

lmms-eval takes the chat model unless it is called with ``--force_simple``. Tasks that compare the
likelihoods of answers need that, because it builds them for simple models alone.
"""

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger as harness_logger

from idefics2_engine.errors import ConfigError
from idefics2_engine.evaluation.continuations import Continuation
from idefics2_engine.evaluation.generation_arguments import ArgumentReader
from idefics2_engine.evaluation.one_pass import Question, answer_all
from idefics2_engine.evaluation.picture_text import message_parts
from idefics2_engine.llm import LLM
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Conversation

# The harness gives this stop string to tasks that have none, and its own models leave it out
_DEFAULT_STOP = "\n\n"

_Round = tuple[Conversation, Any]
"""Messages of a round, and what the task wants back in the next one."""


class _Idefics2Engine(lmms):  # type: ignore[misc]
    """What the two models share.

    Args:
        pretrained: A checkpoint's folder or hub id. If ``None``, the demo checkpoint.
        batch_size: Not used, because the engine forms batches of its own.
        max_batch_size: Not used.
        device: As in ``LLM``. If ``None``, the one of this process under ``accelerate launch``.
        max_new_tokens: Most tokens of an answer if the task does not say.
        options: Arguments of ``LLM``.

    Attributes:
        llm: The engine.

    Raises:
        ConfigError: The model has no chat template.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__()
        _pass_warnings_on()
        self._arguments = ArgumentReader(max_new_tokens, ignored_stops=[_DEFAULT_STOP])
        self.llm = LLM(pretrained, device=device or _own_device(), **options)
        if self.llm.processor.template is None:
            self.clean()
            raise ConfigError(
                f"pretrained: must be a model with a chat template, got {pretrained}; base models "
                "are evaluated with lm-evaluation-harness"
            )

    @property
    def device(self) -> torch.device:
        """The model's device, on which the harness counts requests of several processes."""
        return self.llm.model.device

    def clean(self) -> None:
        """Free the memory of the model, which the harness asks for after the last request."""
        self.llm.close()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, all in one pass."""
        began = time.monotonic()
        outputs = self._answers(requests, [partial(self._question, one) for one in requests])
        results = [_result(output) for output in outputs]
        _report_speed(time.monotonic() - began, results)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer requests of several rounds, each round of all requests in one pass.

        Returns:
            The answers of each request. The task says after each how it goes on.
        """
        answers: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going_on = [*range(len(requests))]

        def ask(index: int) -> Question | None:
            request = requests[index]
            following = self._round(request, answers[index], notes[index])
            if following is None:
                return None
            messages, notes[index] = following
            return messages, self._arguments.params(self._generation(request))

        while going_on:
            asked = [requests[index] for index in going_on]
            outputs = self._answers(asked, [partial(ask, index) for index in going_on])
            answered = [pair for pair in zip(going_on, outputs, strict=True) if pair[1] is not None]
            for index, output in answered:
                answers[index].append(_result(output).text)
            going_on = [index for index, _ in answered]
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score answers as the assistant's whole turn.

        Returns:
            For each request a pair: the loss, and whether the model would have given this answer.
            The loss is the negative log probability of a token of the answer and its end, on
            average. The harness takes the answer of the lowest loss, so it is infinite without a
            result. The pairs are in objects because the evaluator makes text of bare ones.
        """
        scored: list[Continuation | None] = [None] * len(requests)

        def ask(index: int) -> Question:
            continuation = self._continuation(requests[index])
            scored[index] = continuation
            return continuation.question()

        makers = [partial(ask, index) for index in range(len(requests))]
        results = []
        for continuation, output in zip(scored, self._answers(requests, makers), strict=True):
            loss, is_greedy = inf, False
            if continuation is not None and output is not None:
                logprob, number, is_greedy = continuation.likelihood(output)
                loss = -logprob / max(1, number)
            results.append(GenerationResult((loss, is_greedy)))
        return results

    def _answers(
        self, requests: Sequence[Instance], makers: Sequence[Callable[[], Question | None]]
    ) -> list[RequestOutput | None]:
        def name(index: int) -> str:
            return f"document {requests[index].doc_id} of {requests[index].task_name}"

        return answer_all(self.llm, makers, name)

    def _question(self, request: Instance) -> Question:
        messages, _ = self._round(request, [], None) or ([], None)
        return messages, self._arguments.params(self._generation(request))

    def _continuation(self, request: Instance) -> Continuation:
        # Two arguments are a text and an answer alone
        context, target, *rest = request.args
        images, document = [], None
        if rest:
            to_images, doc_id, task, split = rest
            document = self.task_dict[task][split][doc_id]
            images = _flat(to_images(document))
        answer = target if isinstance(target, str) else target(document)
        return Continuation.of_chat(
            self.llm.processor,
            [{"role": "user", "content": message_parts(context, images)}],
            answer,
            self.llm.request_builder.generation.eos_token_ids,
        )

    @abstractmethod
    def _generation(self, request: Instance) -> dict[str, Any]:
        """Return the arguments of a request's generation."""

    @abstractmethod
    def _round(self, request: Instance, answers: list[str], note: Any) -> _Round | None:
        """Return what follows ``answers``, ``None`` if the request ends with them."""


class Idefics2EngineChat(_Idefics2Engine):
    """The chat model, whose tasks make conversations."""

    is_simple = False

    def _generation(self, request: Instance) -> dict[str, Any]:
        arguments: dict[str, Any] = request.args[2]
        return arguments or {}

    def _round(self, request: Instance, answers: list[str], note: Any) -> _Round | None:
        _, to_messages, _, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        if not answers:
            return _messages(to_messages(document), task), None
        following = to_messages(
            document,
            round_idx=len(answers),
            previous_output=list(answers),
            previous_round_info=note,
        )
        # A task of one round returns messages again
        if not isinstance(following, tuple):
            return None
        turns, is_end, _, note = following
        return None if is_end else (_messages(turns, task), note)


class Idefics2EngineSimple(_Idefics2Engine):
    """The simple model, whose tasks make a text and pictures."""

    is_simple = True

    def _generation(self, request: Instance) -> dict[str, Any]:
        arguments: dict[str, Any] = request.args[1]
        return arguments or {}

    def _round(self, request: Instance, answers: list[str], note: Any) -> _Round | None:
        context, _, to_images, *to_text, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        if not answers:
            return [_user(context, to_images(document))], None
        if not to_text:
            return None
        images, context, is_end, _, note = to_text[0](
            document,
            previous_output=list(answers),
            round_idx=len(answers),
            previous_round_info=note,
        )
        return None if is_end else ([_user(context, images)], note)


class _ToHarness(logging.Handler):
    """A handler that passes records on to the log of lmms-eval, which is loguru's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass ``record`` on."""
        harness_logger.opt(depth=6).log(record.levelname, "{}", record.getMessage())


def _pass_warnings_on() -> None:
    """Show this package's warnings in the log of lmms-eval."""
    package = logging.getLogger("idefics2_engine")
    if not any(isinstance(handler, _ToHarness) for handler in package.handlers):
        package.addHandler(_ToHarness(logging.WARNING))


def _own_device() -> str:
    """Return the GPU of this process if ``accelerate`` started several."""
    place = os.environ.get("LOCAL_RANK")
    return f"cuda:{place}" if place and torch.cuda.is_available() else "auto"


def _messages(turns: Any, task: str) -> Conversation:
    """Return a task's messages as ``LLM.chat`` accepts them."""
    messages: list[dict[str, Any]] = ChatMessages(messages=turns).to_hf_messages()
    kinds = {part["type"] for message in messages for part in message["content"]}
    if not kinds <= {"text", "image"}:
        raise ConfigError(
            f"{task}: messages must be of text and images, got {', '.join(sorted(kinds))}"
        )
    return messages


def _user(text: str, images: Any) -> dict[str, Any]:
    return {"role": "user", "content": message_parts(text, _flat(images))}


def _flat(images: Any) -> list[Any]:
    """Return the pictures of a document, which some tasks put into lists of their own."""
    if isinstance(images, list | tuple):
        return [picture for some in images for picture in _flat(some)]
    return [] if images is None else [images]


def _result(output: RequestOutput | None) -> GenerationResult:
    """Return an answer with its counts, or an empty one without."""
    if output is None or output.error is not None:
        return GenerationResult("", TokenCounts())
    (answer,) = output.outputs
    counts = TokenCounts(len(output.prompt_token_ids), len(answer.token_ids))
    return GenerationResult(answer.text, counts)


def _report_speed(seconds: float, results: Sequence[GenerationResult]) -> None:
    """Tell the harness how fast the answers came."""
    tokens = sum(result.token_counts.output_tokens or 0 for result in results)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds,
        additional_metrics={"total_requests": len(results)},
    )
