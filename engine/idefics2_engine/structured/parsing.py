"""Answers that are JSON as Python's values."""

import json
import logging
from typing import Any

from idefics2_engine.structured.params import StructuredOutputsParams

_logger = logging.getLogger(__name__)


def parse_answer(params: StructuredOutputsParams | None, text: str) -> Any:
    """Return the value of a whole answer, or an object of the caller's class of pydantic.

    It is ``None`` if the answer is not JSON by ``params``. It is also ``None`` if the class refuses
    the value by a rule that its schema does not have, or if a number has too many digits for
    Python. A warning is logged then.
    """
    if params is None or not params.is_json:
        return None
    try:
        if params.model is not None:
            return params.model.model_validate_json(text)
        return json.loads(text)
    # The class may run any code of the caller
    except Exception as error:
        _logger.warning("an answer is not parsed: %s", type(error).__name__)
        return None
