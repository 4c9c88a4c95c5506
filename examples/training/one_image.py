"""Questions about one scene, each with exactly one right answer, derived from its description."""

import random
from collections.abc import Callable

from phrasings import (
    ASKED_AT,
    AT,
    DESCRIBE,
    HOW_MANY,
    IS_THERE,
    LARGEST,
    NUMBERS,
    SMALLEST,
    WHAT_AT,
    WHAT_COLOR,
    WHAT_IS_WRITTEN,
    WHAT_NUMBER,
    WHAT_WORD,
    WHERE,
    WHICH_SHAPE_AT,
)
from scenes import CELLS, COLORS, SHAPES, Item, Scene

# A question and its answer
Turn = tuple[str, str]

# Share of the questions about an absent number or word that are dropped
_SELDOM_ABSENT = 0.85
# Sizes are compared only if one is this many times the other
_CLEARLY = 1.4


def a(noun: str) -> str:
    """Put the indefinite article in front of ``noun``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def named(item: Item) -> str:
    """Name ``item`` with its article: ``a red circle``, ``the number 47``, ``the word "lamp"``."""
    return a(item.name) if item.kind == "shape" else f"the {item.name}"


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def listed(parts: list[str]) -> str:
    """Join ``parts`` (at least one) with commas and a last ``and``."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    """Begin ``text`` with a capital and end it with a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def counted(number: int, one: str, many: str) -> str:
    """Say how many there are: ``There are two circles.``."""
    return f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {many}."


def unique(scene: Scene) -> list[tuple[str, Item]]:
    """Return a phrase for every shape that its name, or its color and name, identifies."""
    found = []
    for item in scene.shapes:
        same_shape = [other for other in scene.shapes if other.text == item.text]
        if len(same_shape) == 1:
            found.append((item.text, item))
        if sum(other.color == item.color for other in same_shape) == 1:
            found.append((item.name, item))
    return found


def askable_cells(scene: Scene) -> list[int]:
    """List the cells for which "what is there" has one answer, even if places are meant as halves.

    ``on the left`` names the middle of the left column, so nothing else may be in that column. The
    same holds for the other three sides. A cell under a wide text is named by the middle of its row
    alone.
    """
    sides = {1: (0, 2), 7: (6, 8), 3: (0, 6), 5: (2, 8)}
    covered = {cell for item in scene.items if item.wide for cell in item.cells}
    occupied = {item.cell for item in scene.items} | covered
    cells = []
    for cell in CELLS:
        item = scene.at(cell)
        if cell in covered and (item is None or not item.wide):
            continue
        neighbors = () if item is not None and item.wide else sides.get(cell, ())
        if not occupied.intersection(neighbors):
            cells.append(cell)
    return cells


def written(kind: str, item: Item | None) -> str:
    """Say which number or word is written."""
    if item is None:
        return f"There is no {kind}."
    return f'The word is "{item.text}".' if kind == "word" else f"The number is {item.text}."


def how_many_shapes(rng: random.Random, scene: Scene) -> Turn:
    """Ask for the total number of shapes."""
    things = (
        rng.choice(("shapes", "objects")) if len(scene.shapes) == len(scene.items) else "shapes"
    )
    question = rng.choice(HOW_MANY).format(things)
    return question, counted(len(scene.shapes), "shape", "shapes")


def some_shapes(rng: random.Random, scene: Scene) -> tuple[str, str, int]:
    """Choose shapes by color, name or both; return singular, plural and their number."""
    item = rng.choice(scene.shapes) if scene.shapes and rng.random() < 0.75 else None
    shape = item.text if item else rng.choice(SHAPES)
    color = item.color if item and rng.random() < 0.85 else rng.choice(tuple(COLORS))
    by = rng.choice(("color", "color", "shape", "shape", "both"))
    if by == "color":
        count = sum(other.color == color for other in scene.shapes)
        return f"{color} shape", f"{color} shapes", count
    if by == "shape":
        return shape, plural(shape), sum(other.text == shape for other in scene.shapes)
    both = sum(other.color == color and other.text == shape for other in scene.shapes)
    return f"{color} {shape}", f"{color} {plural(shape)}", both


def _count_of(rng: random.Random, scene: Scene) -> Turn:
    one, many, count = some_shapes(rng, scene)
    return rng.choice(HOW_MANY).format(many), counted(count, one, many)


def _color(rng: random.Random, scene: Scene) -> Turn | None:
    targets = [(name, item.color) for name, item in unique(scene) if name == item.text]
    targets += [(item.kind, item.color) for item in scene.items if item.kind != "shape"]
    choice = rng.random()
    if choice < 0.12 or not scene.items:
        target, color = "background", scene.background
    elif choice < 0.2:
        target = rng.choice(SHAPES)
        if any(item.text == target for item in scene.shapes):
            return None
        return rng.choice(WHAT_COLOR).format(target), f"There is no {target}."
    elif choice < 0.35:
        cells = [c for c in askable_cells(scene) if (item := scene.at(c)) and item.kind == "shape"]
        if not cells:
            return None
        cell = rng.choice(cells)
        item = scene.at(cell)
        assert item is not None
        question = rng.choice(WHAT_COLOR).format(f"shape {rng.choice(ASKED_AT[cell])}")
        return question, f"The shape {AT[cell]} is {item.color}."
    elif targets:
        target, color = rng.choice(targets)
    else:
        return None
    return rng.choice(WHAT_COLOR).format(target), f"The {target} is {color}."


def _where(rng: random.Random, scene: Scene) -> Turn | None:
    targets = [(name, item.cell) for name, item in unique(scene)]
    targets += [(item.kind, item.cell) for item in scene.items if item.kind != "shape"]
    if rng.random() < 0.1:
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        if any(item.text == shape and item.color == color for item in scene.shapes):
            return None
        name = f"{color} {shape}"
        return rng.choice(WHERE).format(name), f"There is no {name}."
    if not targets:
        return None
    name, cell = rng.choice(targets)
    return rng.choice(WHERE).format(name), f"The {name} is {AT[cell]}."


def seen_at(scene: Scene, cell: int) -> str:
    """Return the phrase for the item in ``cell``."""
    item = scene.at(cell)
    return "Nothing." if item is None else sentence(named(item))


def _what_at(rng: random.Random, scene: Scene) -> Turn | None:
    cells = askable_cells(scene)
    full = [cell for cell in cells if scene.at(cell)]
    cells = full if full and rng.random() < 0.9 else cells
    if not cells:
        return None
    cell = rng.choice(cells)
    item = scene.at(cell)
    phrasings = WHICH_SHAPE_AT if item and item.kind == "shape" and rng.random() < 0.4 else WHAT_AT
    return rng.choice(phrasings).format(rng.choice(ASKED_AT[cell])), seen_at(scene, cell)


def _number(rng: random.Random, scene: Scene) -> Turn | None:
    item = scene.text("number")
    if item is None and rng.random() < _SELDOM_ABSENT:
        return None
    answer = written("number", item)
    anywhere = item is not None and scene.text("word") is None and rng.random() < 0.2
    return rng.choice(WHAT_IS_WRITTEN if anywhere else WHAT_NUMBER), answer


def _word(rng: random.Random, scene: Scene) -> Turn | None:
    item = scene.text("word")
    if item is None and rng.random() < _SELDOM_ABSENT:
        return None
    answer = written("word", item)
    anywhere = item is not None and scene.text("number") is None and rng.random() < 0.3
    return rng.choice(WHAT_IS_WRITTEN if anywhere else WHAT_WORD), answer


def _describe(rng: random.Random, scene: Scene) -> Turn | None:
    if not 1 <= len(scene.items) <= 5:
        return None
    parts = [f"{named(item)} {AT[item.cell]}" for item in scene.items]
    return rng.choice(DESCRIBE), sentence(listed(parts))


def _yes_no(rng: random.Random, scene: Scene) -> Turn | None:
    wanted = rng.random() < 0.5
    style = rng.choice(("thing", "thing", "thing", "color", "place", "count", "text"))
    if style == "thing":
        names = {name for item in scene.shapes for name in (item.text, item.name)}
        every = [*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
        near = [f"{rng.choice(tuple(COLORS))} {item.text}" for item in scene.shapes]
        near += [f"{item.color} {rng.choice(SHAPES)}" for item in scene.shapes]
        pool = (
            sorted(names) if wanted else [n for n in rng.sample(every, 4) + near if n not in names]
        )
        if not pool:
            return None
        question = rng.choice(IS_THERE).format(a(rng.choice(pool)))
    elif style == "color":
        targets = [item for name, item in unique(scene) if name == item.text]
        if not targets:
            return None
        item = rng.choice(targets)
        others = [color for color in COLORS if color != item.color]
        question = f"Is the {item.text} {item.color if wanted else rng.choice(others)}?"
    elif style == "place":
        targets_at = [(name, item.cell) for name, item in unique(scene)]
        if not targets_at:
            return None
        name, cell = rng.choice(targets_at)
        # A place that shares a side with the true one is neither right nor wrong
        row, column = divmod(cell, 3)
        clear = [other for other in CELLS if other // 3 != row and other % 3 != column]
        if not wanted and not clear:
            return None
        question = f"Is the {name} {AT[cell if wanted else rng.choice(clear)]}?"
    elif style == "count":
        count = len(scene.shapes)
        asked = count if wanted else rng.choice([n for n in range(1, 10) if n != count])
        if asked == 0:
            return None
        are = "Is there one shape?" if asked == 1 else f"Are there {NUMBERS[asked]} shapes?"
        question = are
        wanted = asked == count
    else:
        kind = rng.choice(("number", "word"))
        wanted = scene.text(kind) is not None
        question = rng.choice(IS_THERE).format(f"a {kind}")
    return question, "Yes." if wanted else "No."


def _size(rng: random.Random, scene: Scene) -> Turn | None:
    ranked = sorted(scene.shapes, key=lambda item: item.size)
    if len(ranked) < 2:
        return None
    single = [item for name, item in unique(scene) if name == item.name]
    ends: list[tuple[tuple[str, ...], Item]] = []
    if ranked[-1].size >= _CLEARLY * ranked[-2].size and ranked[-1] in single:
        ends.append((LARGEST, ranked[-1]))
    if ranked[1].size >= _CLEARLY * ranked[0].size and ranked[0] in single:
        ends.append((SMALLEST, ranked[0]))
    if not ends:
        return None
    phrasings, item = rng.choice(ends)
    if rng.random() < 0.3:
        others = [other for other in single if other is not item]
        if others:
            pair = [item.name, rng.choice(others).name]
            rng.shuffle(pair)
            bigger = rng.choice(("bigger", "larger")) if phrasings is LARGEST else "smaller"
            return f"Which is {bigger}, the {pair[0]} or the {pair[1]}?", f"The {item.name}."
    return rng.choice(phrasings), f"The {item.name}."


ONE_IMAGE: dict[str, Callable[[random.Random, Scene], Turn | None]] = {
    "count": how_many_shapes,
    "count_of": _count_of,
    "color": _color,
    "where": _where,
    "what_at": _what_at,
    "number": _number,
    "word": _word,
    "describe": _describe,
    "yes_no": _yes_no,
    "size": _size,
}
"""Functions by kind that draw a question, or ``None`` if the scene does not allow one."""


def any_turn(rng: random.Random, scene: Scene) -> Turn | None:
    """Draw a question of any kind."""
    return ONE_IMAGE[rng.choice(tuple(ONE_IMAGE))](rng, scene)
