"""Counts of tokens at which two implementations agree, as plain data."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass
class TokenAgreement:
    """Agreement of A and B on the successors of some tokens.

    Tokens with logits that are not finite agree on nothing, and have no divergence.

    Attributes:
        tokens: Tokens that were compared.
        same_best: Those with the same best successor.
        not_finite: Those at which a logit of A or B is not finite.
        total_kl: Sum of the KL divergences of B's distribution from A's, in nats.
        largest_kl: The largest of them.
        largest_margin: Where the best tokens differ, the largest difference of their logits in B.
        greedy_tokens: Tokens that A chose as the best ones when it answered.
        greedy_best: Those that are the best of B.
        greedy_margin: The largest difference in B of the logits of the best token and of a greedy
            token that is not the best one.
    """

    tokens: int = 0
    same_best: int = 0
    not_finite: int = 0
    total_kl: float = 0.0
    largest_kl: float = 0.0
    largest_margin: float = 0.0
    greedy_tokens: int = 0
    greedy_best: int = 0
    greedy_margin: float = 0.0

    def add(self, other: Self) -> None:
        """Add the tokens of ``other``."""
        for field in fields(self):
            own, more = getattr(self, field.name), getattr(other, field.name)
            is_largest = field.name.startswith("largest_") or field.name == "greedy_margin"
            setattr(self, field.name, max(own, more) if is_largest else own + more)

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens with the same best successor; ``None`` without tokens."""
        return self.same_best / self.tokens if self.tokens else None

    @property
    def mean_kl(self) -> float | None:
        """Mean divergence; ``None`` if there is none."""
        finite = self.tokens - self.not_finite
        return self.total_kl / finite if finite else None

    @property
    def greedy_agreement(self) -> float | None:
        """Share of greedy tokens that are the best of B; ``None`` without such tokens."""
        return self.greedy_best / self.greedy_tokens if self.greedy_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data, from which ``TokenAgreement(**data)`` makes it again."""
        return asdict(self)
