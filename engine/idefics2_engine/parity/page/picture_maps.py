"""Heat maps of patches over their picture: where, and from which layer on, A and B differ."""

from collections.abc import Sequence, Set
from dataclasses import replace

from idefics2_engine.charts.picture_map import Overlay, Panel, PictureMap
from idefics2_engine.charts.shades import Shades, pooled
from idefics2_engine.images.tiling import QUARTERS
from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.worst_cases import WorstCase

_MOST_STAGES = 3
_MOST_IMAGES = 2
# Of a panel, along a side
_MOST_CELLS = 32


def picture_maps(
    worst: WorstCase, order: Sequence[str], differing: Set[str], shades: Shades
) -> dict[int, PictureMap]:
    """Return maps of the worst pictures of a case, the worst first, by their numbers.

    These are two pictures, or one if no stage of patches differs. A map has three stages: the first
    that differs, the one with the largest difference, and the last. The four quarters of a picture
    are laid over it, beside the whole one.

    Args:
        worst: The case.
        order: Stages of the model.
        differing: Those that differ beyond rounding.
        shades: The scale.
    """
    patches = [stage for stage in order if stages.unit(stage) == "patch"]
    first = next((stage for stage in patches if stage in differing), None)
    found = {}
    for image in range(len(worst.pictures)):
        tiles = _tiles(worst, image)
        own = [stage for stage in patches if _is_known(worst, stage, tiles)]
        if own:
            at_first = _largest(worst, first, tiles) if first in own else 0.0
            at_any = max(_largest(worst, stage, tiles) for stage in own)
            found[image] = (at_first, at_any), own
    worst_first = sorted(found, key=lambda image: found[image][0], reverse=True)
    shown = worst_first[: 1 if first is None else _MOST_IMAGES]
    maps = {
        image: _picture_map(worst, image, found[image][1], differing, shades) for image in shown
    }
    if len(shown) == len(worst.pictures):
        return maps
    which = f" The worst {len(shown)} of {len(worst.pictures)} images."
    return {image: replace(chart, note=f"{chart.note}{which}") for image, chart in maps.items()}


def _picture_map(
    worst: WorstCase, image: int, own: Sequence[str], differing: Set[str], shades: Shades
) -> PictureMap:
    tiles = _tiles(worst, image)
    views = {"": tiles}
    if len(tiles) == QUARTERS + 1:
        views = {"quarters, ": tiles[:QUARTERS], "whole, ": tiles[QUARTERS:]}
    shown = _chosen(worst, own, tiles, differing)
    panels = [
        [
            _panel(worst, stage, name, view, stage in differing, _MOST_CELLS // len(views))
            for name, view in views.items()
        ]
        for stage in shown
    ]
    differs = ", among them the first that differs" if differing & set(shown) else ""
    note = f"{len(shown)} of {len(own)} stages with patches{differs}."
    if max(max(worst.recording.grids[tile]) for tile in tiles) > _MOST_CELLS // len(views):
        note += " A cell is the largest of several patches."
    picture = worst.pictures[image]
    width, height = picture.size
    heading = f"{worst.title}: patches of image {image}"
    mark = "differs beyond rounding"
    return PictureMap(heading, picture.source, height / width, panels, shades, note, mark)


def _chosen(worst: WorstCase, own: Sequence[str], tiles: range, differing: Set[str]) -> list[str]:
    """Return the stages that are shown, in order."""
    first = next((stage for stage in own if stage in differing), own[0])
    largest = max(own, key=lambda stage: _largest(worst, stage, tiles))
    # If two of them are the same, the stages after the first show how its difference spreads
    wanted = dict.fromkeys([first, largest, own[-1], *own[own.index(first) :], *own])
    shown = list(wanted)[:_MOST_STAGES]
    return [stage for stage in own if stage in shown]


def _panel(
    worst: WorstCase, stage: str, view: str, tiles: range, is_marked: bool, most: int
) -> Panel:
    places = [place for picture in worst.pictures for place in picture.tiles]
    overlays = []
    for tile in tiles:
        rows = worst.differences[stage][tile].reshape(worst.recording.grids[tile])
        overlays.append(Overlay(places[tile], pooled(rows, most)))
    largest = _largest(worst, stage, tiles)
    return Panel(stage, f"{view}{largest:.1e}" if largest else f"{view}equal", overlays, is_marked)


def _tiles(worst: WorstCase, image: int) -> range:
    each = worst.recording.tiles_per_image
    return range(image * each, (image + 1) * each)


def _is_known(worst: WorstCase, stage: str, tiles: range) -> bool:
    """Return whether the patches of all tiles could be compared."""
    parts, grids = worst.differences.get(stage, []), worst.recording.grids
    return len(parts) == len(grids) and all(
        len(parts[tile]) == grids[tile][0] * grids[tile][1] for tile in tiles
    )


def _largest(worst: WorstCase, stage: str, tiles: range) -> float:
    return max(float(worst.differences[stage][tile].max()) for tile in tiles)
