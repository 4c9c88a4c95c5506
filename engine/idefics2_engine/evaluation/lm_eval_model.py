"""The model ``idefics2_engine`` of lm-evaluation-harness: texts, and texts with pictures.

Importing this module registers it.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from idefics2_engine.evaluation.continuations import Continuation
from idefics2_engine.evaluation.generation_arguments import ArgumentReader
from idefics2_engine.evaluation.one_pass import Question, answer_all
from idefics2_engine.evaluation.picture_text import message_parts
from idefics2_engine.images.loader import ImageSource
from idefics2_engine.llm import LLM
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.prompts.tokenizer import IMAGE

_logger = logging.getLogger(__name__)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""The harness's own form of a request: texts, and tokens of context and continuation."""


@register_model("idefics2_engine")
class Idefics2EngineLM(TemplateLM):  # type: ignore[misc]
    """The model.

    Contexts are raw prompts, as in ``LLM.generate``: ``<image>`` is the place of a picture, and
    control tokens are control tokens. ``--apply_chat_template`` makes conversations of them.

    Args:
        pretrained: A checkpoint's folder or hub id. If ``None``, the demo checkpoint.
        batch_size: Not used, because the engine forms batches of its own.
        max_batch_size: Not used.
        device: As in ``LLM``. On a machine without a GPU it is always the CPU.
        max_gen_toks: Most tokens of an answer if the task does not say.
        options: Arguments of ``LLM``.

    Attributes:
        llm: The engine.
    """

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str | Path | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        self._name = str(pretrained)
        self._arguments = ArgumentReader(max_gen_toks)
        # The command asks for a GPU if nobody does
        asked = device if device and (device == "cpu" or torch.cuda.is_available()) else "auto"
        self.llm = LLM(pretrained, device=asked, **options)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.llm.processor.tokenizer.eos_id
        assert token is not None
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text, after which a text without a context is scored."""
        token = self.llm.processor.tokenizer.bos_id
        return self.eot_token_id if token is None else token

    @property
    def max_length(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.llm.engine_config.max_model_len

    @property
    def tokenizer_name(self) -> str:
        """Name of the model, by which the harness knows its stored requests."""
        return self._name

    def close(self) -> None:
        """Free the memory of the model."""
        self.llm.close()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_others: Any
    ) -> list[int]:
        """Return the tokens of a raw prompt, with each ``<image>`` expanded.

        Args:
            string: The prompt.
            add_special_tokens: Whether it begins with the token that begins texts. If ``None``, it
                does unless it has it already.
        """
        processor = self.llm.processor
        # The tokens do not depend on what a picture shows
        pictures = [b""] * string.count(IMAGE)
        token_ids = processor.draft_prompt(string, pictures).token_ids
        begins_twice = token_ids[:2] == [processor.tokenizer.bos_id] * 2
        if add_special_tokens is False or (add_special_tokens is None and begins_twice):
            begins = token_ids[:1] == [processor.tokenizer.bos_id]
            return token_ids[begins:]
        return token_ids

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as a raw prompt.

        Args:
            chat_history: Messages, whose text has ``<image>`` where a picture is.
            add_generation_prompt: End where the assistant's answer begins. If not, end with the
                last message's text, which the answer continues.
        """
        prompt = self._rendered(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return prompt
        last = chat_history[-1]["content"]
        return prompt[: prompt.rindex(last) + len(last)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests, all in one pass."""
        texts = [""] * len(requests)

        def finished(index: int, output: RequestOutput) -> None:
            if output.error is None:
                texts[index] = output.outputs[0].text
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])

        makers = [partial(self._question, request) for request in requests]
        answer_all(self.llm, makers, _names(requests), finished)
        return texts

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts, all in one pass; -inf without a result."""
        makers = [partial(self._continuation, request) for request in requests]

        def finished(index: int, result: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index].args, result)

        return self._score(makers, _names(requests), finished)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows of the model's length; all windows in one pass."""
        owners: list[int] = []
        windows: list[TokenRequest] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                # One token is generated, because a request needs one
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                owners.append(index)
                windows.append((None, context, continuation))
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        makers = [
            partial(Continuation, [*context, *continuation], len(context))
            for _, context, continuation in requests
        ]
        return self._score(makers, "text {}".format)

    def _question(self, request: Instance) -> Question:
        context, arguments, *media = request.args
        params = self._arguments.params(arguments)
        token_ids, images = self.tok_encode(context), _pictures(media)
        # Without an image for each of its tokens a prompt would be refused
        if not images:
            assert params.max_tokens is not None
            token_ids = _end_of(token_ids, max(1, self.max_length - params.max_tokens))
        return {"prompt_token_ids": token_ids, "multi_modal_data": {"image": images}}, params

    def _continuation(self, request: Instance) -> Continuation:
        context, continuation, *media = request.args
        images = _pictures(media)
        continuation = self._space(context, continuation) + continuation
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
        whole = [*before, *after]
        # One token is generated
        token_ids = whole if images else _end_of(whole, self.max_length - 1)
        start = len(before) - (len(whole) - len(token_ids))
        return Continuation(token_ids, max(1, start), images)

    def _space(self, context: str, continuation: str) -> str:
        """Return the space that the harness leaves out between a chat's end and an answer."""
        opening, space = self._opening
        needs_space = opening and context.endswith(opening) and not continuation[:1].isspace()
        return space if needs_space else ""

    @cached_property
    def _opening(self) -> tuple[str, str]:
        """What the chat template writes before an answer, and the space between the two."""
        if self.llm.processor.template is None:
            return "", ""
        question = {"role": "user", "content": "a"}
        closed = self._rendered([question], False)
        opening = self._rendered([question], True).removeprefix(closed)
        answered = self._rendered([question, {"role": "assistant", "content": "a"}], False)
        answer = answered.removeprefix(closed + opening)
        return opening, answer[: len(answer) - len(answer.lstrip())]

    def _rendered(self, history: list[dict[str, Any]], opens: bool) -> str:
        """Return messages by the chat template, open for an answer or closed."""
        messages = [
            {"role": turn["role"], "content": message_parts(turn["content"])} for turn in history
        ]
        pictures = [b""] * sum(turn["content"].count(IMAGE) for turn in history)
        processor = self.llm.processor
        chat = processor.render_chat(messages, pictures, opens)
        return processor.tokenizer.unmark(chat.marked)

    def _score(
        self,
        makers: Sequence[Callable[[], Continuation]],
        name: Callable[[int], str],
        finished: Callable[[int, tuple[float, bool]], None] = lambda _index, _result: None,
    ) -> list[tuple[float, bool]]:
        results = [(-inf, False)] * len(makers)
        scored: dict[int, Continuation] = {}

        def ask(index: int) -> Question:
            scored[index] = makers[index]()
            return scored[index].question()

        def score(index: int, output: RequestOutput) -> None:
            if output.error is None:
                logprob, _, is_greedy = scored.pop(index).likelihood(output)
                results[index] = logprob, is_greedy
                finished(index, results[index])

        answer_all(self.llm, [partial(ask, index) for index in range(len(makers))], name, score)
        return results


def _names(requests: Sequence[Instance]) -> Callable[[int], str]:
    """Return a function that names a request in the log."""
    return lambda index: f"document {requests[index].doc_id} of {requests[index].task_name}"


def _end_of(token_ids: list[int], longest: int) -> list[int]:
    """Return the last ``longest`` tokens, with a warning if some are left out."""
    left_out = len(token_ids) - longest
    if left_out <= 0:
        return token_ids
    _logger.warning(
        "a text of %d tokens loses its first %d, which do not fit", len(token_ids), left_out
    )
    return token_ids[left_out:]


def _pictures(media: Sequence[dict[str, Any]]) -> list[ImageSource]:
    """Return the pictures of a request, whose third argument has them."""
    return [picture for some in media for picture in some.get("visual", [])]
