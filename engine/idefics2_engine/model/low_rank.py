"""Low-rank changes of linear layers, computed beside the weights and not merged into them."""

from collections.abc import Sequence

from torch import Tensor, nn

# Rows of ``a`` are padded to a multiple of this, so that cuBLAS has its fast kernels
_RANKS = 16


class LowRank(nn.Module):
    """The change b @ a of a weight (N, K): ``a`` (R, K) and ``b`` (N, R), scaled already."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)

    @classmethod
    def combine(
        cls, shape: tuple[int, int], changes: Sequence[tuple[int, Tensor, Tensor]]
    ) -> "LowRank":
        """Join changes of different rows of one weight of ``shape`` (N, K).

        A change is the first of its rows, its a and its b. The joined b is block-diagonal, so one
        product serves all. Other rows are not changed, and the joined rank is padded with zeros.
        """
        N, K = shape
        ranks = sum(a.shape[0] for _, a, _ in changes)
        padded = -(-ranks // _RANKS) * _RANKS
        first = changes[0][1]
        joined_a, joined_b = first.new_zeros(padded, K), first.new_zeros(N, padded)
        column = 0
        for row, a, b in changes:
            columns = slice(column, column + a.shape[0])
            joined_a[columns] = a
            joined_b[row : row + b.shape[0], columns] = b
            column = columns.stop
        return cls(joined_a, joined_b)

    def of_rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return a and b of ``count`` rows of the weight from row ``first`` on."""
        return self.a, self.b[first : first + count]
