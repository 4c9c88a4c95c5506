"""Whether recordings can be compared: the same model, the same inputs, the stages asked for."""

from collections.abc import Iterable

from idefics2_engine.errors import ConfigError
from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.measure import Legs


def check_alike(legs: Legs, wanted: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless A and B are recordings of one model and as many inputs.

    Both must have the stages ``wanted``.
    """
    orders = [[s for s in leg.order if not stages.is_inside(s)] for leg in (legs.a, legs.b)]
    if orders[0] != orders[1]:
        raise ConfigError("the paths must have the same stages, got those of different models")
    if len(legs.a.cases) != len(legs.b.cases):
        raise ConfigError(
            f"the paths must have the same inputs, got {len(legs.a.cases)} and {len(legs.b.cases)}"
        )
    for leg in (legs.a, legs.b):
        for stage in wanted:
            if stage not in leg.order:
                raise ConfigError(
                    f"the recording of {leg.path} has no stage {stage}: record it with --inside"
                )


def check_inputs(legs: Legs) -> None:
    """Raise ``ConfigError`` unless the float64 leg has the inputs of A or of B.

    A path may prepare its inputs wrongly, but not both in the same way. With other inputs, the
    errors of both sides would be large and their ratio would say nothing.
    """
    exact = legs.exact
    if exact is None:
        return
    for case in range(len(exact.cases)):
        for stage in stages.INPUTS:
            wanted = [leg.hashes[case].get(stage) for leg in (legs.a, legs.b)]
            if exact.hashes[case].get(stage) not in wanted:
                raise ConfigError(
                    f"case {case}: the inputs must be those of the recordings, got another {stage}"
                )
