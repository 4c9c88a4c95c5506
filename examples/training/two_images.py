"""Pairs of scenes and questions about them, each with exactly one right answer."""

import random
from dataclasses import replace

from one_image import Turn, a, counted, listed, named, sentence, written
from phrasings import (
    AT,
    DIFFERENCE,
    ORDINALS,
    SAME,
    THE_DIFFERENCE,
    WHICH_IMAGE,
)
from scenes import (
    BACKGROUNDS,
    COLORS,
    MIDDLE_CELLS,
    PLACES,
    SHAPES,
    Item,
    Scene,
    random_scene,
    random_shape,
    random_size,
    random_text,
    recolored,
    redrawn,
    visible_colors,
    with_background,
)


def random_pair(rng: random.Random, invented: float = 0.0) -> tuple[Scene, Scene]:
    """Draw two scenes of one size: a scene and an edited copy, or two independent ones."""
    size = random_size(rng)
    first = random_scene(rng, size, max_shapes=5, invented=invented)
    if rng.random() < 0.3:
        second = random_scene(rng, size, max_shapes=3, with_text=0.35, invented=invented)
        if len(first.items) > 3:
            first = first.with_items(rng.sample(first.items, 3))
    else:
        second = _edited(rng, first, invented)
        if rng.random() < 0.5:
            second = redrawn(rng, second)
    return (first, second) if rng.random() < 0.5 else (second, first)


def _edited(rng: random.Random, scene: Scene, invented: float) -> Scene:
    """Change one thing about ``scene``, or sometimes nothing."""
    edited = scene
    while rng.random() > 0.1 and edited == scene:
        edited = _edit(rng, scene, invented)
    return edited


def _edit(rng: random.Random, scene: Scene, invented: float) -> Scene:
    """Try one change; if the scene does not allow it, return the scene as it is."""
    items = list(scene.items)
    target = rng.choice(items) if items else None
    edit = rng.choice((*("color", "shape", "move") * 2, *("add", "remove", "text", "background")))
    if edit == "background":
        return _on_other_background(rng, scene)
    if edit == "add" and scene.free_cells and len(scene.shapes) < 6:
        items.append(random_shape(rng, scene, rng.choice(scene.free_cells)))
    elif target is None:
        return scene
    elif edit == "remove":
        items.remove(target)
    elif edit == "text" and target.kind != "shape":
        text = target.text
        while text == target.text or (
            target.kind == "number" and len(text) > 2 and not target.wide
        ):
            text = random_text(rng, scene.with_items([]), target.kind, invented).text
        items[items.index(target)] = replace(target, text=text)
    elif edit == "color":
        colors = [color for color in visible_colors(scene.background) if color != target.color]
        items[items.index(target)] = recolored(rng, target, rng.choice(colors))
    elif edit == "shape" and target.kind == "shape":
        shape = rng.choice([shape for shape in SHAPES if shape != target.text])
        items[items.index(target)] = replace(target, text=shape)
    elif edit == "move" and not target.wide and scene.free_cells:
        items[items.index(target)] = replace(target, cell=rng.choice(scene.free_cells))
    elif edit == "move" and target.wide:
        free = set(scene.free_cells)
        rows = [cell for cell in MIDDLE_CELLS if {cell - 1, cell, cell + 1} <= free]
        if rows:
            items[items.index(target)] = replace(target, cell=rng.choice(rows))
    return scene.with_items(items)


def _on_other_background(rng: random.Random, scene: Scene) -> Scene:
    colors = {item.color for item in scene.items}
    fitting = [
        name
        for name in BACKGROUNDS
        if name != scene.background and colors <= set(visible_colors(name))
    ]
    return with_background(rng, scene, rng.choice(fitting)) if fitting else scene


def difference(first: Scene, second: Scene) -> str | None:
    """Return the difference of two scenes, or ``None`` if it takes more than a sentence.

    If one thing changed, it is named. If more changed and each scene has one to three items, both
    are listed.
    """
    gone = [item for item in first.items if not any(_alike(item, other) for other in second.items)]
    come = [item for item in second.items if not any(_alike(item, other) for other in first.items)]
    other_background = first.background != second.background
    if not gone and not come:
        if other_background:
            return (
                f"The background is {first.background} in the first image "
                f"and {second.background} in the second."
            )
        return "The two images are the same."
    if not other_background and len(gone) <= 1 and len(come) <= 1:
        one = _one_change(gone[0] if gone else None, come[0] if come else None, first, second)
        if one is not None:
            return one
    if 1 <= len(first.items) <= 3 and 1 <= len(second.items) <= 3:
        shown = [listed([named(item) for item in scene.items]) for scene in (first, second)]
        return f"The first image shows {shown[0]}, the second image shows {shown[1]}."
    return None


def _alike(one: Item, other: Item) -> bool:
    return _look(one) == _look(other) and one.cell == other.cell


def _look(item: Item) -> tuple[str, str, str]:
    return item.kind, item.text, item.color


def _one_change(gone: Item | None, come: Item | None, first: Scene, second: Scene) -> str | None:
    if gone is None and come is not None:
        return f"The second image also has {named(come)} {AT[come.cell]}."
    if come is None and gone is not None:
        return sentence(f"the {gone.name} {AT[gone.cell]} is missing in the second image")
    assert gone is not None
    assert come is not None
    if gone.kind != come.kind:
        return None
    if gone.cell != come.cell:
        if _look(gone) != _look(come):
            return None
        # If two items look the same, the moved one is ambiguous, but both places are certain
        return f"The {gone.name} moved from the {PLACES[gone.cell]} to the {PLACES[come.cell]}."
    if gone.kind == "shape" and gone.text != come.text and gone.color != come.color:
        return None
    if gone.text == come.text:
        what = f"{gone.text} {AT[gone.cell]}" if gone.kind == "shape" else gone.kind
        return f"The {what} is {gone.color} in the first image and {come.color} in the second."
    if gone.color != come.color:
        return None
    if gone.kind == "shape":
        return f"The {gone.name} {AT[gone.cell]} is {a(come.name)} in the second image."
    quote = '"' if gone.kind == "word" else ""
    return (
        f"The {gone.kind} is {quote}{gone.text}{quote} in the first image "
        f"and {quote}{come.text}{quote} in the second."
    )


def ask_difference(rng: random.Random, scenes: tuple[Scene, ...]) -> Turn | None:
    """Ask how two scenes differ."""
    answer = difference(*scenes)
    if answer is None:
        return None
    question = THE_DIFFERENCE if rng.random() < 0.3 else rng.choice(DIFFERENCE)
    return question, answer


def ask_compare(rng: random.Random, scenes: tuple[Scene, ...]) -> Turn | None:
    """Ask for something else about two scenes.

    The question is which of them has more items, which shows an item, or what is in one of them.
    """
    counts = [len(scene.shapes) for scene in scenes]
    style = rng.choice(("more", "which", "which", "same", "count", "text"))
    if style == "more":
        phrasing, sign = rng.choice((("more", 1), ("more", 1), ("fewer", -1)))
        question = rng.choice(
            (
                f"Which image has {phrasing} shapes?",
                f"Which of the two images has {phrasing} shapes?",
            )
        )
        if counts[0] == counts[1]:
            return question, "Both images have the same number of shapes."
        ahead = ORDINALS[(counts[1] - counts[0]) * sign > 0]
        return question, f"The {ahead} image."
    if style == "which":
        items = [item for scene in scenes for item in scene.shapes]
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        name = rng.choice(items).name if items and rng.random() < 0.85 else f"{color} {shape}"
        shows = [any(item.name == name for item in scene.shapes) for scene in scenes]
        answer = ("Neither image.", "The second image.", "The first image.", "Both images.")[
            2 * shows[0] + shows[1]
        ]
        return rng.choice(WHICH_IMAGE).format(a(name)), answer
    if style == "same":
        answer = "Yes." if difference(*scenes) == "The two images are the same." else "No."
        return rng.choice(SAME), answer
    place = rng.randrange(2)
    where = f"in the {ORDINALS[place]} image"
    if style == "count":
        answer = counted(counts[place], "shape", "shapes")
        return f"How many shapes are {where}?", answer
    kind = rng.choice(("number", "word"))
    item = scenes[place].text(kind)
    question = f"What {kind} is {rng.choice(('', 'written ', 'shown '))}{where}?"
    return question, written(kind, item)
