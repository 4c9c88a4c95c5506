"""The difference of A and B in each row of each stage."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Rows = npt.NDArray[np.float32]
"""Differences of the rows of a part, relative to the row's largest value."""


class RowDifferences:
    """Keeps one number for each row of each stage while the stages are compared.

    These are four bytes, where a row of a recording has about a thousand elements.
    """

    def __init__(self) -> None:
        self._cases: dict[int, dict[str, list[Rows]]] = {}

    def keep(self, case: int, stage: str, differences: Tensor | None) -> None:
        """Keep the rows of the next part of a stage; ``None`` if it cannot be compared."""
        rows = np.zeros(0) if differences is None else differences.numpy()
        # Of a part with other shapes, nothing is known. A float64 beyond float32 is infinite
        with np.errstate(over="ignore"):
            kept = rows.astype(np.float32)
        self._cases.setdefault(case, {}).setdefault(stage, []).append(kept)

    def of(self, case: int) -> dict[str, list[Rows]]:
        """Return the differences of the parts of each stage of a case."""
        return self._cases.get(case, {})

    def largest(self, case: int, stages: Sequence[str]) -> float:
        """Return the largest difference of a case in ``stages``."""
        own = self.of(case)
        return max(
            (float(part.max()) for stage in stages for part in own.get(stage, []) if len(part)),
            default=0.0,
        )
