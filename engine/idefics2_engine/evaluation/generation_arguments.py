"""A harness's arguments of a generation, which are transformers' or vLLM's, as sampling parameters."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from idefics2_engine.sampling_params import SamplingParams

_logger = logging.getLogger(__name__)

# The harnesses accept all of these. The first that is given counts
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
_IF_SAMPLED = ("top_p", "top_k", "min_p", "seed")
_KNOWN = {*_LENGTHS, *_ALWAYS, *_IF_SAMPLED, "do_sample", "temperature", "until"}


class ArgumentReader:
    """A reader of a harness's arguments, which warns once of each that has no effect.

    Args:
        max_tokens: Most tokens of an answer if the arguments do not say.
        ignored_stops: Stop strings to leave out.
    """

    def __init__(self, max_tokens: int, ignored_stops: Collection[str] = ()) -> None:
        self._max_tokens = max_tokens
        self._ignored_stops = {"", *ignored_stops}
        self._warned: set[str] = set()
        # Requests that share their parameters share the object, which is then checked once
        self._read: dict[str, SamplingParams] = {}

    def params(self, arguments: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters that ``arguments`` mean.

        ``do_sample=False``, a temperature of 0 and neither of them mean greedy decoding.

        Raises:
            SamplingError: A value is out of range or of the wrong type.
        """
        text = repr(arguments)
        if text not in self._read:
            self._read[text] = self._params(arguments)
        return self._read[text]

    def _params(self, arguments: Mapping[str, Any]) -> SamplingParams:
        given = {name: value for name, value in arguments.items() if value is not None}
        for name in given.keys() - _KNOWN - self._warned:
            self._warned.add(name)
            # One beam is what every answer has
            if (name, given[name]) != ("num_beams", 1):
                _logger.warning("generation argument %s=%r has no effect", name, given[name])
        samples = given.get("do_sample", given.get("temperature", 0.0) > 0)
        values = {name: given[name] for name in _ALWAYS if name in given}
        if samples:
            values["temperature"] = given.get("temperature", 1.0)
            values |= {name: given[name] for name in _IF_SAMPLED if name in given}
            # transformers reads 0 as no limit
            if values.get("top_p") == 0:
                del values["top_p"]
        else:
            values["temperature"] = 0.0
        until = given.get("until", [])
        stops = [until] if isinstance(until, str) else until
        return SamplingParams(
            max_tokens=next((given[name] for name in _LENGTHS if name in given), self._max_tokens),
            stop=[stop for stop in stops if stop not in self._ignored_stops],
            **values,
        )
