"""Examples to train and to test on: one or two scenes and conversations about them, all from a seed.

The questions are put in one of several phrasings; an answer is a short sentence that follows from the scenes alone.
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
ALL_KINDS = (*KINDS, "talk")  # questions that do not refer to each other: only to train on

_INVENTED = 0.1  # of the words in training
_WITH_TEXT = 0.6  # of the scenes in training print a number, a word or both
_PAIRS = 0.3  # of the examples have two scenes
_DIFFERENCES, _COMPARISONS = 3, 3  # tries for a pair
_TRIES = 12  # for a scene; not every scene allows every question
_TALK_TURNS = (2, 5)  # fewest and most
# how often a kind is tried
_PRACTICE = {
    "count": 0.7,
    "count_of": 1.0,
    "color": 0.9,
    "where": 1.2,
    "what_at": 1.4,
    "number": 2.0,
    "word": 3.0,
    "describe": 5.0,  # all that is to be seen, in one answer
    "yes_no": 1.0,
    "size": 1.8,
    "two_turn": 1.8,
    "talk": 9.0,  # several answers learnt from one look at the image
}
_TALKED_OF = {kind: _PRACTICE[kind] for kind in ONE_IMAGE if kind != "describe"}  # it says it all


@dataclass(frozen=True)
class Conversation:
    """Turns about the one or two images of an example, the first turn's images before its text."""

    kind: str
    turns: tuple[Turn, ...]
    num_images: int = 1
    text_first: bool = False  # the images after the first question instead


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
