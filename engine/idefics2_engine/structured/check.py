"""Checks of a constraint without a tokenizer, before any model is loaded."""

from functools import lru_cache

from idefics2_engine.errors import SamplingError, install_extras
from idefics2_engine.structured.grammar import NO_SPACE, grammar_of, plain_regex
from idefics2_engine.structured.limits import MOST_SECONDS, limits, reason, within
from idefics2_engine.structured.params import StructuredOutputsParams


def check_constraint(params: StructuredOutputsParams) -> None:
    """Refuse a constraint that cannot be enforced whole with any tokenizer.

    Raises:
        SamplingError: It cannot, or llguidance is not installed.
    """
    refused = _refused(params)
    if refused is not None:
        raise SamplingError(refused)


def import_llguidance() -> None:
    """Raise ``SamplingError`` if llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise SamplingError(
            f"structured_outputs needs llguidance, got none: {install_extras('structured')}"
        ) from None


@lru_cache(256)
def _refused(params: StructuredOutputsParams) -> str | None:
    try:
        import_llguidance()
        within(MOST_SECONDS, lambda: _validate(params), params.kind)
    except SamplingError as error:
        return str(error)
    return None


def _validate(params: StructuredOutputsParams) -> None:
    from llguidance import LLMatcher

    for grammar in (plain_regex(params), grammar_of(params, NO_SPACE)):
        if grammar is None:
            continue
        _, said = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
        for one in said:
            raise SamplingError(reason(params.kind, one))
