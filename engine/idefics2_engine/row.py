"""Rows of ``LLM.iterate`` and ``LLM.submit``: prompts with keys, by which they are known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from json.encoder import encode_basestring_ascii
from numbers import Integral
from typing import Any

from idefics2_engine.errors import PromptError, short_repr
from idefics2_engine.field_checks import MismatchError, check
from idefics2_engine.sampling_params import SamplingParams

Prompt = str | Mapping[str, Any]
"""A raw prompt.

Either text, or a mapping with ``"prompt": text`` or ``"prompt_token_ids": ids``, and optionally
``"multi_modal_data": {"image": image or images}``.
"""

Conversation = Sequence[Mapping[str, Any]]
"""Messages ``{"role": …, "content": …}`` in the format of OpenAI or transformers."""


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt or conversation with a key, which its output has as well.

    Attributes:
        key: A string or a 64-bit integer, which the caller chooses. It determines the seed of a row
            whose parameters have none. Rows with the same key get the same seed.
        prompt: The prompt or conversation. It is checked when the row is read.
        sampling_params: Its parameters. If ``None``, those of the call.

    Raises:
        PromptError: The key is of another type.
    """

    key: str | int
    prompt: Prompt | Conversation
    sampling_params: SamplingParams | None = None

    def __post_init__(self) -> None:
        """Check the key, and convert integers of other libraries to Python's."""
        object.__setattr__(self, "key", check("key of a row", self.key, _key, PromptError))


def row_seed(seed: int, row: str | int) -> int:
    """Return 63 bits that depend only on the job's seed and the row's key or index."""
    name = encode_basestring_ascii(row) if isinstance(row, str) else row
    # A list in JSON
    digest = blake2b(f"[{seed}, {name}]".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _key(value: object) -> str | int:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, bool) or not isinstance(value, Integral) or not -(2**63) <= value < 2**63  # type: ignore[operator]
    ):
        raise MismatchError("a string or a 64-bit integer", short_repr(value))
    return int(value)
