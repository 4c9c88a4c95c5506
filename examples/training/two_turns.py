"""Second questions that refer to the first: ``And on the right?``, ``Where is it?``."""

import random
from collections.abc import Callable

from one_image import (
    Turn,
    a,
    any_turn,
    askable_cells,
    counted,
    how_many_shapes,
    seen_at,
    some_shapes,
    unique,
    written,
)
from phrasings import ASKED_AT, AT, IS_THERE, WHAT_AT, WHAT_COLOR, WHAT_NUMBER, WHAT_WORD, WHERE
from scenes import Scene

Turns = tuple[Turn, Turn]


def two_turns(rng: random.Random, scene: Scene) -> Turns | None:
    """Draw a question and a follow-up, or ``None`` if the scene does not allow them."""
    return rng.choice(_STYLES)(rng, scene)


def _also(rng: random.Random, thing: str) -> str:
    return rng.choice(("And {}?", "What about {}?", "And what about {}?")).format(thing)


def _places(rng: random.Random, scene: Scene) -> Turns | None:
    cells = [cell for cell in askable_cells(scene) if scene.at(cell) or rng.random() < 0.1]
    if len(cells) < 2:
        return None
    one, two = rng.sample(cells, 2)
    first = rng.choice(WHAT_AT).format(rng.choice(ASKED_AT[one]))
    place = rng.choice(ASKED_AT[two])
    second = rng.choice((_also(rng, place), f"And {place}?", f"And what is {place}?"))
    return (first, seen_at(scene, one)), (second, seen_at(scene, two))


def _colors(rng: random.Random, scene: Scene) -> Turns | None:
    colors = {item.text: item.color for name, item in unique(scene) if name == item.text}
    if len(colors) < 2:
        return None
    one, two = rng.sample(sorted(colors), 2)
    return (rng.choice(WHAT_COLOR).format(one), f"The {one} is {colors[one]}."), (
        _also(rng, f"the {two}"),
        f"The {two} is {colors[two]}.",
    )


def _whereabouts(rng: random.Random, scene: Scene) -> Turns | None:
    targets = unique(scene)
    if len({item.cell for _, item in targets}) < 2:
        return None
    one, first = rng.choice(targets)
    two, second = rng.choice([(name, item) for name, item in targets if item is not first])
    return (rng.choice(WHERE).format(one), f"The {one} is {AT[first.cell]}."), (
        _also(rng, f"the {two}"),
        f"The {two} is {AT[second.cell]}.",
    )


def _counts(rng: random.Random, scene: Scene) -> Turns:
    one, many, number = some_shapes(rng, scene)
    question = rng.choice(("And how many {}?", "How many {}?")).format(many)
    if one.endswith(" shape") and rng.random() < 0.6:
        question = f"How many of them are {one.removesuffix(' shape')}?"
    return how_many_shapes(rng, scene), (question, counted(number, one, many))


def _texts(rng: random.Random, scene: Scene) -> Turns | None:
    number, word = scene.text("number"), scene.text("word")
    if number is None and word is None:
        return None
    numbers = rng.choice(WHAT_NUMBER), written("number", number)
    words = rng.choice(WHAT_WORD), written("word", word)
    if rng.random() < 0.5:
        return numbers, (_also(rng, "the word"), words[1])
    return words, (_also(rng, "the number"), numbers[1])


def _there(rng: random.Random, scene: Scene) -> Turns | None:
    targets = unique(scene)
    if not targets:
        return None
    name, item = rng.choice(targets)
    answer = f"The {name} is {AT[item.cell]}."
    return (rng.choice(IS_THERE).format(a(name)), "Yes."), ("Where is it?", answer)


def _unrelated(rng: random.Random, scene: Scene) -> Turns | None:
    first, second = any_turn(rng, scene), any_turn(rng, scene)
    if first is None or second is None or first[1] == second[1]:
        return None
    return first, second


_STYLES: tuple[Callable[[random.Random, Scene], Turns | None], ...] = (
    _places,
    _places,
    _colors,
    _whereabouts,
    _counts,
    _texts,
    _there,
    _unrelated,
)
