"""The heat maps of a comparison, each with the name of its file."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from idefics2_engine.charts.drawing import Chart
from idefics2_engine.charts.shades import Shades
from idefics2_engine.parity.measures.verdict import Verdict
from idefics2_engine.parity.page.picture_maps import picture_maps
from idefics2_engine.parity.page.token_map import token_map
from idefics2_engine.parity.result import Comparison

_LABEL = "Difference, relative to the row's largest value"


@dataclass(frozen=True)
class NamedMap:
    """A heat map, the name of its file, and the case that it is of."""

    name: str
    case: int
    chart: Chart


def heat_maps(comparison: Comparison) -> list[NamedMap]:
    """Return the maps of the worst cases, the worst first."""
    if why_no_maps(comparison) is not None:
        return []
    order = [one.stage for one in comparison.stages]
    differing = {one.stage for one in comparison.stages if one.verdict is Verdict.DIFFERS}
    shades = _shades(comparison)
    maps: list[NamedMap] = []
    for worst in comparison.worst_cases:
        name = f"case-{worst.case}"
        pictures = [
            NamedMap(f"{name}-image-{image}", worst.case, chart)
            for image, chart in picture_maps(worst, order, differing, shades).items()
        ]
        tokens = token_map(worst, order, differing, shades)
        # The note would be the same beside each map
        tokens = replace(tokens, note="" if maps else tokens.note)
        maps += [NamedMap(f"{name}-tokens", worst.case, tokens), *pictures]
    return maps


def why_no_maps(comparison: Comparison) -> str | None:
    """Return why there are no maps of a comparison, ``None`` if there are some."""
    digests = [name.upper() for name in "ab" if getattr(comparison, name)["digest"]]
    if digests:
        verb = "is a digest" if len(digests) == 1 else "are digests"
        return f"{' and '.join(digests)} {verb}, without the values of rows"
    return "there is no difference to show" if comparison.same_bits else None


def _shades(comparison: Comparison) -> Shades:
    """Return a scale for all maps, which begins where the dtype rounds."""
    dtypes = {side["dtype"] for side in (comparison.a, comparison.b)} - {"float64"}
    eps = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    parts = [
        part[np.isfinite(part)]
        for worst in comparison.worst_cases
        for stage_parts in worst.differences.values()
        for part in stage_parts
    ]
    largest = max((float(part.max()) for part in parts if len(part)), default=0.0)
    return Shades.spanning(eps, largest, _LABEL)
