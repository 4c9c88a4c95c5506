"""Trials of a bisection: A again with some operations replaced, as far as a stage needs it."""

from collections.abc import Callable, Sequence

from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.result import Comparison
from idefics2_engine.parity.search.bisection import Bisection, bisect

Rerun = Callable[[Sequence[str], Sequence[str], int], Comparison]
"""Compares again with operations of A replaced, the given stages, and most tokens of an answer."""


def explain(
    comparison: Comparison, called: Sequence[str], rerun: Rerun, max_tokens: int
) -> Bisection:
    """Find the operations that explain why the stages of ``comparison`` differ.

    Args:
        comparison: What was found.
        called: Operations of A that may be replaced, in the order of their first call.
        rerun: Runs a trial.
        max_tokens: Most tokens of an answer.
    """
    order = [one.stage for one in comparison.stages]

    def differs(names: Sequence[str], stage: str) -> bool:
        # Stages of images do not depend on the answer
        tokens = max_tokens if stages.unit(stage) == "token" else 1
        trial = rerun(names, _needed(stage), tokens)
        verdicts = {one.stage: one.verdict for one in trial.stages}
        return verdicts[stage] is Verdict.DIFFERS

    def next_difference(names: Sequence[str]) -> str | None:
        return _first(rerun(names, order, max_tokens))

    first = _first(comparison)
    return bisect(first, _likeliest_first(first, called), differs, next_difference)


def _first(comparison: Comparison) -> str | None:
    first = comparison.first_difference
    return None if first is None else first.stage


def _needed(stage: str) -> list[str]:
    """Return the stages that must be recorded to judge ``stage``."""
    if stage in (stages.TOKENS, stages.TEXT):
        return [stages.LOGITS, stages.TOKENS, stages.TEXT]
    return [stage]


def _likeliest_first(first: str | None, called: Sequence[str]) -> list[str]:
    """Return the operations in the order of their trials, none for a stage of the inputs."""
    if first is None or first in stages.INPUTS:
        return []
    # The operations that the text model alone calls are called last
    is_text = stages.unit(first) == "token"
    return list(reversed(called)) if is_text else list(called)
