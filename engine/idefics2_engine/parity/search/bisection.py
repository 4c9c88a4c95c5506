"""The search for the operations that explain why A and B differ.

A trial replaces some operations of A by the reference's, and looks whether a stage still differs.
The search starts at the first stage that differs. It tries all operations together, then each
alone, and then looks for a smallest set by delta debugging (Zeller and Hildebrandt, "Simplifying
and isolating failure-inducing input", 2002). The next stage that differs is explained in the same
way, until none does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise


@dataclass(frozen=True)
class Explanation:
    """What explains that a stage differs.

    Attributes:
        stage: The stage.
        operations: Operations that must be replaced by the reference's, besides those that explain
            earlier stages. None of them can be left out. Empty if no operations explain the stage.
    """

    stage: str
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Bisection:
    """The result of a search.

    Attributes:
        explanations: Of the first stage that differs, then of the first that differs without the
            operations found so far, and so on.
        trials: How often A was computed again.
    """

    explanations: tuple[Explanation, ...]
    trials: int

    @property
    def operations(self) -> list[str]:
        """All operations that were found."""
        return [name for one in self.explanations for name in one.operations]

    @property
    def unexplained(self) -> str | None:
        """The stage that no operation explains, if any."""
        return next((one.stage for one in self.explanations if not one.operations), None)


def bisect(
    first: str | None,
    operations: Sequence[str],
    differs: Callable[[Sequence[str], str], bool],
    next_difference: Callable[[Sequence[str]], str | None],
) -> Bisection:
    """Find the operations that explain each stage that differs.

    Args:
        first: The first stage that differs.
        operations: Operations that may be replaced, the likeliest first.
        differs: Whether a stage differs with the given operations replaced.
        next_difference: The first stage that differs with the given operations replaced.
    """
    known: dict[tuple[str, frozenset[str]], bool] = {}

    def explains(stage: str, before: Sequence[str], names: Sequence[str]) -> bool:
        key = stage, frozenset([*before, *names])
        if key not in known:
            known[key] = not differs([*before, *names], stage)
        return known[key]

    found: list[str] = []
    explanations, rounds, stage = [], 0, first
    while stage is not None:
        rest = [name for name in operations if name not in found]
        smallest = smallest_set(rest, partial(explains, stage, tuple(found)))
        explanations.append(Explanation(stage, tuple(smallest)))
        if not smallest:
            break
        found += smallest
        rounds += 1
        stage = next_difference(found)
    return Bisection(tuple(explanations), len(known) + rounds)


def smallest_set(items: Sequence[str], explains: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return items that explain a difference together and of which none can be left out.

    One item alone is preferred. The list is empty if all items together explain nothing.
    """
    if not items or not explains(items):
        return []
    if len(items) == 1:
        return list(items)
    for item in items:
        if explains([item]):
            return [item]
    return _delta_debugged(list(items), explains)


def _delta_debugged(items: list[str], explains: Callable[[Sequence[str]], bool]) -> list[str]:
    """Leave out parts of ``items``, which explain a difference, as long as the rest explains it."""
    parts = 2
    while len(items) > 2:
        kept = next((rest for rest in _without_a_part(items, parts) if explains(rest)), None)
        if kept is not None:
            items, parts = kept, max(parts - 1, 2)
        elif parts < len(items):
            parts = min(2 * parts, len(items))
        else:
            break
    return items


def _without_a_part(items: list[str], parts: int) -> Iterable[list[str]]:
    """Yield ``items`` without each of ``parts`` parts of about one size, in turn."""
    bounds = [len(items) * index // parts for index in range(parts + 1)]
    for start, stop in pairwise(bounds):
        yield items[:start] + items[stop:]
