"""Sampling parameters of rows: the job's, changed by the row's own."""

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from idefics2_engine.errors import SamplingError
from idefics2_engine.jobs.readers.bad_row import BadRowError
from idefics2_engine.jobs.readers.json_line import json_type
from idefics2_engine.jobs.store.canonical_json import canonical_json
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.structured.check import check_constraint

# Rows with seeds of their own are all different
_MOST_KEPT = 1024
_LONGEST_KEPT = 4096


class RowSampling:
    """Builds equal parameters once.

    Args:
        defaults: Parameters of the job.
    """

    def __init__(self, defaults: SamplingParams) -> None:
        self._defaults = defaults
        self._values = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
        self._merged = lru_cache(_MOST_KEPT)(self._merge)

    def merge(self, given: Any) -> SamplingParams:
        """Return the parameters of a row that gives some of them in a dict, or none.

        Raises:
            BadRowError: A name is unknown, or a value is out of range or of the wrong type.
        """
        if given is None or given == {}:
            return self._defaults
        if not isinstance(given, Mapping):
            raise BadRowError("schema", f"sampling must be an object, got {json_type(given)}")
        key = _Given(given)
        found = self._merged(key) if key.is_short else self._merge(key)
        if isinstance(found, BadRowError):
            raise BadRowError(found.code, found.message)
        return found

    def _merge(self, given: "_Given") -> SamplingParams | BadRowError:
        try:
            canonical_json(given.values)
        except (TypeError, ValueError):
            return BadRowError("sampling", "sampling must be JSON data, got another value")
        try:
            params = SamplingParams.from_dict({**self._values, **given.values})
            if params.constraint is not None:
                check_constraint(params.constraint)
            return params
        except SamplingError as error:
            return BadRowError(error.code, str(error))


class _Given:
    """Parameters that are found by their text, in which 1, 1.0 and True differ."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._text = repr(self.values)

    @property
    def is_short(self) -> bool:
        """Whether the parameters may be kept."""
        return len(self._text) <= _LONGEST_KEPT

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Given) and other._text == self._text
