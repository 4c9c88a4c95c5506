"""Sampling parameters of sequences as records of one array; host only."""

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from idefics2_engine.scheduling.sequence import Request, Sequence

NO_LOGPROBS = -2
"""Value of the column ``logprobs`` for sequences that request none."""

Columns = npt.NDArray[np.void]
"""Records of ``SAMPLING``."""

SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int64),
        ("seed", np.int64),
        # Likeliest tokens to report
        ("logprobs", np.int64),
        ("min_tokens", np.int64),
        # Whether a token may be barred, biased or penalized for this sequence alone
        ("edits", np.bool_),
        # Whether these edits depend on earlier tokens of the answer
        ("reads_answer", np.bool_),
        # Whether a constraint allows some tokens alone, which depend on earlier ones
        ("constrained", np.bool_),
    ]
)
"""The parameters that the sampler needs in every step. They never change."""


def sampling_columns(sequences: Items[Sequence]) -> Columns:
    """Return a record for each of ``sequences``."""
    return np.array([sampling_record(sequence) for sequence in sequences], SAMPLING)


def sampling_record(sequence: Sequence) -> tuple[float | bool, ...]:
    """Return the record of ``sequence``."""
    params = sequence.request.params
    return (
        params.temperature,
        params.top_p,
        params.min_p,
        max(params.top_k, 0),
        sequence.seed,
        NO_LOGPROBS if params.logprobs is None else params.logprobs,
        params.min_tokens,
        edits_logits(sequence.request),
        reads_answer(sequence.request),
        sequence.request.constraint is not None,
    )


def edits_logits(request: Request) -> bool:
    """Return whether ``request`` bars, biases or penalizes tokens, apart from ``min_tokens``."""
    params = request.params
    return bool(
        params.penalizes
        or params.logit_bias
        or params.allowed_token_ids is not None
        or request.bad_words_ids
    )


def reads_answer(request: Request) -> bool:
    """Return whether the edits of the next logits depend on the previous tokens."""
    return request.params.penalizes or any(len(word) > 1 for word in request.bad_words_ids)
