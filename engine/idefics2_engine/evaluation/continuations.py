"""The likelihood of a text after a prompt, from the prompt's log probabilities.

Prompt and text are one prompt, of which only the text's tokens are scored. The prefix cache has the
rest if another text follows the same prompt.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from idefics2_engine.evaluation.one_pass import Question
from idefics2_engine.images.loader import ImageSource
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.sampling_params import SamplingParams


class Likelihood(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
        logprob: Sum of the log probabilities of its tokens. -inf if its request failed.
        num_tokens: Number of its tokens.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prompt with its continuation.

    Attributes:
        token_ids: Tokens of both, with placeholders expanded.
        start: Position of the continuation's first token, at least 1.
        images: Images of the prompt.
    """

    token_ids: list[int]
    start: int
    images: Sequence[ImageSource] = ()

    @classmethod
    def of_chat(
        cls,
        processor: Processor,
        messages: Sequence[Mapping[str, Any]],
        answer: str,
        end_tokens: Collection[int],
    ) -> "Continuation":
        """Return the assistant's ``answer`` to ``messages``, with the token that ends it.

        Spaces before the answer are left out, because the chat template writes its own.
        """
        context = processor.draft_chat(messages)
        turn = {"role": "assistant", "content": answer.lstrip()}
        whole = processor.draft_chat([*messages, turn], add_generation_prompt=False).token_ids
        # A tokenizer may join the end of the one with the beginning of the other
        start = next(
            place
            for place, token in enumerate(whole)
            if place == len(context.token_ids) or token != context.token_ids[place]
        )
        # Templates write a line feed behind the end token, which no model does
        ends = [place + 1 for place in range(start, len(whole)) if whole[place] in end_tokens]
        return cls(whole[: max(ends, default=len(whole))], start, context.images)

    def question(self) -> Question:
        """Return the request that scores the continuation."""
        # An empty continuation has no position to score
        start = min(self.start, len(self.token_ids) - 1)
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start
        )
        media = {"image": self.images}
        return {"prompt_token_ids": self.token_ids, "multi_modal_data": media}, params

    def likelihood(self, output: RequestOutput) -> Likelihood:
        """Return the likelihood that the ``output`` of its request has."""
        number = len(self.token_ids) - self.start
        if output.prompt_logprobs is None:
            return Likelihood(-inf, number, False)
        scored = zip(self.token_ids, output.prompt_logprobs, strict=True)
        places = [place[token] for token, place in [*scored][self.start :] if place is not None]
        return Likelihood(
            sum(place.logprob for place in places), number, all(place.rank == 1 for place in places)
        )
