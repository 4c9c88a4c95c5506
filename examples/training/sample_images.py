"""Draw the demo's sample images and write the questions about them.

    python examples/training/sample_images.py examples/images

The scenes are composed by hand, so training has not seen them.
"""

import argparse
import json
from pathlib import Path

from scenes import BACKGROUNDS, COLORS, PLACES, Item, Scene, render

_SQUARE, _LANDSCAPE = (448, 448), (448, 336)


def _shape(name: str, color: str, place: str, size: float = 0.8) -> Item:
    return Item("shape", name, color, PLACES.index(place), size, COLORS[color])


def _number(text: str, color: str, place: str, size: float = 0.9) -> Item:
    return Item("number", text, color, PLACES.index(place), size, COLORS[color])


def _word(text: str, color: str, place: str) -> Item:
    return Item("word", text, color, PLACES.index(place), 2.2, COLORS[color], wide=True)


def _scene(size: tuple[int, int], background: str, *items: Item) -> Scene:
    return Scene(*size, background, BACKGROUNDS[background], ()).with_items(list(items))


SAMPLES = {
    "shapes.png": _scene(
        _SQUARE,
        "light blue",
        _shape("circle", "red", "top left"),
        _shape("star", "yellow", "top right", 0.9),
        _shape("heart", "pink", "middle"),
        _shape("triangle", "green", "bottom left"),
        _shape("square", "purple", "bottom right", 0.7),
    ),
    "sign.png": _scene(
        _LANDSCAPE,
        "beige",
        _shape("arrow", "green", "top left"),
        _word("garden", "blue", "middle"),
        _number("42", "red", "bottom right"),
    ),
    "crowd.png": _scene(
        _SQUARE,
        "white",
        _shape("ring", "orange", "top left", 0.5),
        _shape("cross", "black", "top", 0.5),
        _shape("ring", "blue", "top right", 0.5),
        _shape("moon", "blue", "left", 0.5),
        _shape("diamond", "red", "middle", 0.95),
        _shape("star", "blue", "bottom left", 0.5),
        _shape("ring", "green", "bottom right", 0.5),
    ),
    "before.png": _scene(
        _SQUARE,
        "gray",
        _shape("moon", "white", "top"),
        _shape("star", "yellow", "top right", 0.6),
        _shape("diamond", "green", "bottom left"),
    ),
    "after.png": _scene(
        _SQUARE,
        "gray",
        _shape("moon", "white", "top"),
        _shape("star", "yellow", "top right", 0.6),
        _shape("diamond", "red", "bottom left"),
    ),
}

QUESTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("shapes.png",), ("How many shapes are there?", "There are five shapes.")),
    (("shapes.png",), ("What color is the heart?", "The heart is pink.")),
    (("shapes.png",), ("Where is the star?", "The star is at the top right.")),
    (("shapes.png",), ("Is there a blue circle?", "No.")),
    (
        ("shapes.png",),
        (
            "What is at the top left?",
            "A red circle.",
            "And at the bottom right?",
            "A purple square.",
        ),
    ),
    (("sign.png",), ("What word is written?", 'The word is "garden".')),
    (("sign.png",), ("What number is written?", "The number is 42.")),
    (
        ("sign.png",),
        (
            "Describe the image.",
            'A green arrow at the top left, the word "garden" in the middle '
            "and the number 42 at the bottom right.",
        ),
    ),
    (("crowd.png",), ("How many rings are there?", "There are three rings.")),
    (("crowd.png",), ("How many blue shapes are there?", "There are three blue shapes.")),
    (("crowd.png",), ("Which shape is the largest?", "The red diamond.")),
    (
        ("before.png", "after.png"),
        (
            "What's the difference between these two images?",
            "The diamond at the bottom left is green in the first image and red in the second.",
        ),
    ),
    (("shapes.png", "crowd.png"), ("Which image has more shapes?", "The second image.")),
)


def main() -> None:
    """Write the images and ``questions.json`` into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SAMPLES.items():
        render(scene).save(folder / name, optimize=True)
    questions = [
        {"images": images, "turns": [turns[i : i + 2] for i in range(0, len(turns), 2)]}
        for images, turns in QUESTIONS
    ]
    text = json.dumps(questions, indent=1)
    (folder / "questions.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
