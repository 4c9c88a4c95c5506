"""Logits of two implementations at the same tokens, compared row by row."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitsComparison:
    """How two rows of logits differ, for each of T rows.

    Attributes:
        best_a: The best token of A.
        best_b: The best token of B.
        kl: KL divergence of B's distribution from A's, in nats.
        margins: Difference of the logits of these two tokens in the yardstick. 0 where they agree.
    """

    best_a: Tensor  # (T,) int64
    best_b: Tensor  # (T,) int64
    kl: Tensor  # (T,) float64
    margins: Tensor  # (T,) float64

    @property
    def agrees(self) -> Tensor:
        """Whether A and B have the same best token: (T,)."""
        return self.best_a == self.best_b


def compare_logits(a: Tensor, b: Tensor, yardstick: Tensor | None = None) -> LogitsComparison:
    """Compare logits (T, V) in float64.

    Args:
        a: Logits of A.
        b: Logits of B.
        yardstick: Logits that say by how much one token is better than another. If ``None``, those
            of B.
    """
    a, b = a.double(), b.double()
    yardstick = b if yardstick is None else yardstick.double()
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    best_a, best_b = a.argmax(-1), b.argmax(-1)
    pair_a, pair_b = (yardstick.gather(-1, best[:, None])[:, 0] for best in (best_a, best_b))
    return LogitsComparison(
        best_a,
        best_b,
        kl=(log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0),
        margins=(pair_a - pair_b).abs(),
    )
