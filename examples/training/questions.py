"""Examples for training and tests: one or two scenes and conversations about them, from a seed.

Each question uses one of several phrasings. An answer is a short sentence that follows from the
scenes alone.
"""

import random
from dataclasses import dataclass

from one_image import ONE_IMAGE, Turn
from phrasings import THE_DIFFERENCE
from scenes import Scene, random_scene, random_size
from two_images import ask_compare, ask_difference, random_pair
from two_turns import two_turns

PAIR_KINDS = ("difference", "compare")
KINDS = (*ONE_IMAGE, "two_turn", *PAIR_KINDS)
# "talk" is several independent questions, and is for training only
ALL_KINDS = (*KINDS, "talk")

# Share of the words in training that are invented
_INVENTED = 0.1
# Share of the scenes in training that print a number, a word or both
_WITH_TEXT = 0.6
# Share of the examples that have two scenes
_PAIRS = 0.3
# Tries for a pair
_DIFFERENCES, _COMPARISONS = 3, 3
# Tries for a scene. Some scenes do not allow some questions.
_TRIES = 12
# Fewest and most turns
_TALK_TURNS = (2, 5)
# The weights of the kinds in training
_PRACTICE = {
    "count": 0.7,
    "count_of": 1.0,
    "color": 0.9,
    "where": 1.2,
    "what_at": 1.4,
    "number": 2.0,
    "word": 3.0,
    # One answer names everything in the image
    "describe": 5.0,
    "yes_no": 1.0,
    "size": 1.8,
    "two_turn": 1.8,
    # Several answers are learned from one look at the image
    "talk": 9.0,
}
# "describe" is left out because it repeats all other answers
_TALKED_OF = {kind: _PRACTICE[kind] for kind in ONE_IMAGE if kind != "describe"}


@dataclass(frozen=True)
class Conversation:
    """Turns about the one or two images of an example; the images precede the first turn's text."""

    kind: str
    turns: tuple[Turn, ...]
    num_images: int = 1
    # Whether the images follow the first turn's text instead
    text_first: bool = False


@dataclass(frozen=True)
class Example:
    """One or two scenes of one size, and conversations about all of them together."""

    scenes: tuple[Scene, ...]
    conversations: tuple[Conversation, ...]


def example(seed: str, invented: float = _INVENTED) -> Example:
    """Draw one or two scenes and several conversations about them."""
    rng = random.Random(seed)
    if rng.random() < _PAIRS:
        scenes = random_pair(rng, invented)
        pair_kinds = ["difference"] * _DIFFERENCES + ["compare"] * _COMPARISONS
        return Example(
            scenes, _distinct([_pair_conversation(rng, kind, scenes) for kind in pair_kinds])
        )
    scene = random_scene(rng, random_size(rng), with_text=_WITH_TEXT, invented=invented)
    kinds = rng.choices(tuple(_PRACTICE), tuple(_PRACTICE.values()), k=_TRIES)
    return Example((scene,), _distinct([_conversation(rng, kind, scene) for kind in kinds]))


def question_of_kind(
    kind: str, seed: str, invented: float = 0.0
) -> tuple[tuple[Scene, ...], Conversation]:
    """Draw scenes until one allows a question of ``kind``; return them and the conversation."""
    rng = random.Random(seed)
    while True:
        if kind in PAIR_KINDS:
            scenes: tuple[Scene, ...] = random_pair(rng, invented)
            conversation = _pair_conversation(rng, kind, scenes)
        else:
            with_text = 1.0 if kind in ("number", "word") else 0.45
            scenes = (random_scene(rng, random_size(rng), with_text=with_text, invented=invented),)
            conversation = _conversation(rng, kind, scenes[0])
        if conversation is not None:
            return scenes, conversation


def _conversation(rng: random.Random, kind: str, scene: Scene) -> Conversation | None:
    if kind in ONE_IMAGE:
        turns: list[Turn | None] = [ONE_IMAGE[kind](rng, scene)]
    elif kind == "two_turn":
        turns = list(two_turns(rng, scene) or [None])
    else:
        turns = list(_talk(rng, scene))
    return _typed(rng, kind, turns)


def _talk(rng: random.Random, scene: Scene) -> list[Turn | None]:
    count = rng.randint(*_TALK_TURNS)
    kinds = rng.choices(tuple(_TALKED_OF), tuple(_TALKED_OF.values()), k=3 * count)
    drawn = (ONE_IMAGE[kind](rng, scene) for kind in kinds)
    turns: list[Turn | None] = [turn for turn in dict.fromkeys(drawn) if turn is not None]
    return turns[:count] if len(turns) >= count else [None]


def _pair_conversation(
    rng: random.Random, kind: str, scenes: tuple[Scene, ...]
) -> Conversation | None:
    ask = ask_difference if kind == "difference" else ask_compare
    return _typed(rng, kind, [ask(rng, scenes)], num_images=2)


def _typed(
    rng: random.Random, kind: str, turns: list[Turn | None], num_images: int = 1
) -> Conversation | None:
    """Vary how questions are typed: ``colour``, ``picture``, no capital, no question mark."""
    typed = []
    for turn in turns:
        if turn is None:
            return None
        question, answer = turn
        if question != THE_DIFFERENCE:
            if rng.random() < 0.1:
                question = question.replace("color", "colour").replace("image", "picture")
            if rng.random() < 0.1:
                question = question[0].lower() + question[1:]
            if rng.random() < 0.1:
                question = question[:-1]
        typed.append((question, answer))
    return Conversation(kind, tuple(typed), num_images, text_first=rng.random() < 0.1)


def _distinct(conversations: list[Conversation | None]) -> tuple[Conversation, ...]:
    return tuple(dict.fromkeys(c for c in conversations if c is not None))
