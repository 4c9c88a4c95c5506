"""The demo checkpoint's scenes and questions.

Each answer is derived again from the words of the question and the scene.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sample_images
from conversations import held_out_seed
from evaluate_demo import CARD_BEGIN, CARD_END, ask, write_card
from idefics2_engine import LLM
from paths import EXAMPLES
from questions import Conversation, example, question_of_kind
from scenes import BACKGROUNDS, COLORS, SHAPES, Scene, random_scene, random_size, render

DEMO = EXAMPLES / "demo"
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACE_WORDS = {
    "top left": 0, "upper left": 0, "top right": 2, "upper right": 2, "bottom left": 6,
    "lower left": 6, "bottom right": 8, "lower right": 8, "top": 1, "bottom": 7, "left": 3,
    "right": 5, "middle": 4, "center": 4,
}  # fmt: skip


def test_scene_follows_from_its_seed() -> None:
    one, other = (example("some seed") for _ in range(2))
    assert one == other
    assert one != example("another seed")
    drawn = [np.array(render(scene)) for scene in one.scenes]
    again = [np.array(render(scene)) for scene in other.scenes]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_items_are_visible_in_their_cells() -> None:
    rng = random.Random("visible")
    for _ in range(60):
        scene = random_scene(rng, random_size(rng))
        taken = [cell for item in scene.items for cell in item.cells]
        assert len(taken) == len(set(taken))
        for item in scene.items:
            alone = np.array(render(replace(scene, items=(item,))), dtype=int)
            rows, columns = np.nonzero(np.abs(alone - scene.background_rgb).sum(-1) > 60)
            assert len(rows) > 0.0005 * scene.width * scene.height
            place = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            assert int(place[0] / scene.height * 3) == item.cell // 3
            if not item.wide:
                assert int(place[1] / scene.width * 3) == item.cell % 3


def matching(scene: Scene, phrase: str) -> list[int]:
    """Return the cells of the shapes that ``red``, ``circles`` or ``red circle`` names."""
    words = set(re.findall(r"\w+", phrase.lower()))
    colors = words & set(COLORS)
    shapes = {s for s in SHAPES if {s, s + "s", s + "es"} & words}
    return [
        item.cell
        for item in scene.shapes
        if (not colors or item.color in colors) and (not shapes or item.text in shapes)
    ]


def place_in(text: str) -> int:
    found = [place for place in PLACE_WORDS if re.search(rf"\b{place}\b", text)]
    # "in the top middle" means the top. Of two plain words the one other than "middle" counts.
    found = [
        place for place in found if not any(place in other and place != other for other in found)
    ]
    found = [place for place in found if place not in ("middle", "center")] or found
    assert len({PLACE_WORDS[place] for place in found}) == 1, text
    return PLACE_WORDS[found[0]]


def thing_at(scene: Scene, cell: int) -> str:
    item = scene.at(cell)
    if item is None:
        return "nothing"
    article = "an" if item.color[0] in "aeiou" else "a"
    return {
        "shape": f"{article} {item.color} {item.text}",
        "number": f"the number {item.text}",
        "word": f'the word "{item.text}"',
    }[item.kind]


def check_counted(scene: Scene, answer: str) -> None:
    number = re.fullmatch(r"There (?:is|are) (\w+) ([\w ]+)\.", answer)
    assert number
    assert len(matching(scene, number[2])) == NUMBERS.index(number[1])


def check_absent(scene: Scene, thing: str) -> None:
    assert not matching(scene, thing) if thing not in ("number", "word") else not scene.text(thing)


def check_color(scene: Scene, question: str, answer: str) -> None:
    if absent := re.fullmatch(r"There is no (.*)\.", answer):
        return check_absent(scene, absent[1])
    said = re.fullmatch(r"The (.*) is ([\w ]+)\.", answer)
    assert said
    target, color = said.groups()
    if target == "background":
        assert scene.background == color
    elif target in ("number", "word"):
        item = scene.text(target)
        assert item is not None
        assert item.color == color
    else:
        cells = [place_in(target)] if target.startswith("shape") else matching(scene, target)
        (item,) = (scene.at(cell) for cell in cells)
        assert item is not None
        assert item.color == color
    return None


def check_where(scene: Scene, question: str, answer: str) -> None:
    if absent := re.fullmatch(r"There is no (.*)\.", answer):
        return check_absent(scene, absent[1])
    said = re.fullmatch(r"The (.*) is (?:at|on|in) the (.*)\.", answer)
    assert said
    thing, place = said.groups()
    text = scene.text(thing) if thing in ("number", "word") else None
    assert ([text.cell] if text else matching(scene, thing)) == [place_in(place)]
    return None


def check_what_at(scene: Scene, question: str, answer: str) -> None:
    cell = place_in(question)
    assert answer[:-1].lower() == thing_at(scene, cell).lower()
    sides = {1: (0, 2), 3: (0, 6), 5: (2, 8), 7: (6, 8)}
    item = scene.at(cell)
    if item is None or not item.wide:
        near = {c for other in scene.items if other is not item for c in other.cells}
        assert not near.intersection((cell, *sides.get(cell, ())))


def check_text(scene: Scene, question: str, answer: str) -> None:
    if absent := re.fullmatch(r"There is no (.*)\.", answer):
        assert absent[1] in question
        return check_absent(scene, absent[1])
    said = re.fullmatch(r'The (number|word) is "?(\w+)"?\.', answer)
    assert said
    item = scene.text(said[1])
    assert item is not None
    assert item.text == said[2]
    # "what does it say?" has one answer only if there is one text
    if said[1] not in question:
        assert [other.kind for other in scene.items if other.kind != "shape"] == [said[1]]
    return None


def check_describe(scene: Scene, question: str, answer: str) -> None:
    parts = re.split(r", | and ", answer[:-1])
    assert len(parts) == len(scene.items)
    for part, item in zip(parts, scene.items, strict=True):
        said = re.fullmatch(r"(.*) (?:at|on|in) the (.*)", part)
        assert said
        assert said[1].lower() == thing_at(scene, item.cell).lower()
        assert place_in(said[2]) == item.cell


def check_yes_no(scene: Scene, question: str, answer: str) -> None:
    asked = question.lower().rstrip("?")
    if count := re.search(r"there (\w+) shapes?$", asked):
        truth = len(scene.shapes) == NUMBERS.index(count[1]) if count[1] != "a" else None
    elif text := re.search(r"\ba (number|word)\b", asked):
        truth = scene.text(text[1]) is not None
    elif place := re.fullmatch(r"is the (.*) ((?:at|on|in) the .*)", asked):
        truth = matching(scene, place[1]) == [place_in(place[2])]
    elif color := re.fullmatch(r"is the (\w+) (\w+)", asked):
        (cell,) = matching(scene, color[1])
        truth = cell in matching(scene, color[2])
    else:
        truth = bool(matching(scene, asked))
    assert answer == ("Yes." if truth else "No.")


def check_size(scene: Scene, question: str, answer: str) -> None:
    (cell,) = matching(scene, answer)
    item = scene.at(cell)
    assert item is not None
    others = [other.size for other in scene.shapes if other is not item]
    if re.search(r"largest|biggest|bigger|larger", question):
        assert item.size >= 1.4 * max(others)
    else:
        assert item.size * 1.4 <= min(others)
    assert (item.color in question) == (" or " in question)


def check_count(scene: Scene, question: str, answer: str) -> None:
    check_counted(scene, answer)
    assert set(re.findall(r"\w+", answer)) & set(COLORS) == set(re.findall(r"\w+", question)) & set(
        COLORS
    )


CHECKS: dict[str, Callable[[Scene, str, str], None]] = {
    "count": check_count,
    "count_of": check_count,
    "color": check_color,
    "where": check_where,
    "what_at": check_what_at,
    "number": check_text,
    "word": check_text,
    "describe": check_describe,
    "yes_no": check_yes_no,
    "size": check_size,
}


@pytest.mark.parametrize("kind", CHECKS)
def test_answers_about_one_image_are_right(kind: str) -> None:
    for place in range(250):
        (scene,), conversation = question_of_kind(kind, f"test {kind} {place}")
        for question, answer in conversation.turns:
            CHECKS[kind](scene, question, answer)


def test_second_answers_are_right() -> None:
    for place in range(300):
        (scene,), conversation = question_of_kind("two_turn", f"test {place}")
        assert len(conversation.turns) == 2
        first, second = conversation.turns
        if second[0].lower().startswith("where is it"):
            thing = re.search(r"\ban? ([\w ]*?)(?: in (?:the|this) \w+)?\??$", first[0])
            assert thing
            assert thing[1] in second[1]
            assert first[1] == "Yes."
        for question, answer in conversation.turns:
            check_any(scene, question, answer)


def check_any(scene: Scene, question: str, answer: str) -> None:
    if answer in ("Yes.", "No."):
        check_yes_no(scene, question, answer)
    elif re.match(r"There (is|are)", answer) and answer.split()[2] in NUMBERS[1:]:
        check_counted(scene, answer)
    elif absent := re.fullmatch(r"There (?:is|are) no (.*)\.", answer):
        check_absent(scene, absent[1])
    elif re.match(r"The (number|word) is .*[\d\"]", answer):
        check_text(scene, question + " number word", answer)
    elif re.match(r"The .* is (at|on|in) the ", answer):
        check_where(scene, question, answer)
    elif re.match(r"The .* is ", answer):
        check_color(scene, question, answer)
    elif re.search(r"larg|big|small", question):
        check_size(scene, question, answer)
    elif re.search(r" (at|on|in) the ", answer):
        check_describe(scene, question, answer)
    else:
        check_what_at(scene, question, answer)


def described(scene: Scene) -> set[tuple[int, str, str]]:
    return {(item.cell, thing_at(scene, item.cell), item.color) for item in scene.items}


def test_difference_answers_are_complete() -> None:
    seen = set()
    for place in range(400):
        (first, second), conversation = question_of_kind("difference", f"test {place}")
        ((_, answer),) = conversation.turns
        here, there = described(first), described(second)
        gone, come = sorted(here - there), sorted(there - here)
        if answer == "The two images are the same.":
            assert (here, first.background) == (there, second.background)
        elif answer.startswith("The background"):
            assert here == there
            assert first.background != second.background
            wanted = f"The background is {first.background} in the first image and {second.background} in the second."
            assert answer == wanted
        elif answer.startswith("The first image shows"):
            for scene, part in zip(
                (first, second), answer[:-1].split(" image shows ")[1:], strict=True
            ):
                said = re.split(r", | and ", part.removesuffix(", the second"))
                assert said == [thing_at(scene, item.cell) for item in scene.items]
        elif moved := re.fullmatch(r"The (.*) moved from the (.*) to the (.*)\.", answer):
            assert [thing[0] for thing in gone + come] == [place_in(moved[2]), place_in(moved[3])]
            assert all(moved[1] in thing for _, thing, _ in gone + come)
            assert gone[0][2] == come[0][2]
        elif also := re.fullmatch(
            r"The second image also has (.*) (?:at|on|in) the (.*)\.", answer
        ):
            assert not gone
            assert [thing[:2] for thing in come] == [(place_in(also[2]), also[1])]
        elif missing := re.fullmatch(
            r"The (.*) (?:at|on|in) the (.*) is missing in the second image\.", answer
        ):
            assert not come
            assert [thing[0] for thing in gone] == [place_in(missing[2])]
            assert missing[1] in gone[0][1]
        else:
            # One item was replaced by another at the same place
            assert len(gone) == len(come) == 1
            assert gone[0][0] == come[0][0]
            halves = re.split(" is an? | in the first image and ", answer)
            for (_, thing, color), half in zip(gone + come, halves, strict=True):
                words = set(re.findall(r"\w+", half))
                assert {thing.split()[-1].strip('"'), color} & words
        seen.add(answer.split()[1])
    assert len(seen) > 5


def test_comparisons_are_right() -> None:
    for place in range(400):
        scenes, conversation = question_of_kind("compare", f"test {place}")
        ((question, answer),) = conversation.turns
        asked = question.lower()
        counts = [len(scene.shapes) for scene in scenes]
        if "more" in asked or "fewer" in asked:
            order = counts if "more" in asked else counts[::-1]
            wanted = "The first image." if order[0] > order[1] else "The second image."
            equal = "Both images have the same number of shapes."
            assert answer == (equal if counts[0] == counts[1] else wanted)
        elif "same" in asked or "identical" in asked:
            same = described(scenes[0]) == described(scenes[1])
            same &= scenes[0].background == scenes[1].background
            assert (answer == "Yes.") == same
        elif ordinal := re.search(r"\bin the (first|second)\b", asked):
            check_any(
                scenes[ordinal[1] == "second"], question, re.sub(r" in the \w+ image", "", answer)
            )
        else:
            shows = [bool(matching(scene, asked)) for scene in scenes]
            begins = ("Neither", "The second", "The first", "Both")[2 * shows[0] + shows[1]]
            assert answer.startswith(begins)


def test_held_out_scenes_are_not_training_scenes() -> None:
    seen = {scene for place in range(300) for scene in example(f"training 0 {place}").scenes}
    assert not seen & {
        s for i in range(50) for s in question_of_kind("count", held_out_seed("count", i))[0]
    }
    assert not seen & set(sample_images.SAMPLES.values())


def test_sample_images_are_drawn_by_the_script() -> None:
    for name, scene in sample_images.SAMPLES.items():
        with Image.open(EXAMPLES / "images" / name) as image:
            assert image.size == (scene.width, scene.height)
            stored = np.array(image, dtype=int)
        # The last digit may depend on Pillow's release
        assert np.abs(stored - np.array(render(scene), dtype=int)).mean() < 1
        assert scene.background in BACKGROUNDS


def test_sample_questions_have_right_answers() -> None:
    entries = json.loads((EXAMPLES / "images" / "questions.json").read_text())
    assert entries
    for entry in entries:
        scenes = [sample_images.SAMPLES[name] for name in entry["images"]]
        for question, answer in entry["turns"]:
            if len(scenes) == 1:
                check_any(scenes[0], question, answer)
    before, after = sample_images.SAMPLES["before.png"], sample_images.SAMPLES["after.png"]
    assert described(before) - described(after) == {(6, "a green diamond", "green")}
    assert described(after) - described(before) == {(6, "a red diamond", "red")}


def test_demo_checkpoint_answers_the_sample_questions() -> None:
    llm = LLM(device="cpu")
    entries = json.loads((EXAMPLES / "images" / "questions.json").read_text())
    for turns in (1, 2):
        asked = [
            (
                tuple(sample_images.SAMPLES[name] for name in entry["images"]),
                Conversation("sample", tuple(map(tuple, entry["turns"])), len(entry["images"])),
            )
            for entry in entries
            if len(entry["turns"]) == turns
        ]
        assert asked
        for (_, conversation), answers in zip(asked, ask(llm, asked), strict=True):
            assert answers == [answer for _, answer in conversation.turns], conversation


def test_second_question_follows_the_models_own_answer() -> None:
    asked = [question_of_kind("two_turn", f"ask {place}") for place in range(3)]

    class Echo:
        """A model whose answer is the number of messages."""

        def chat(self, chats: list[list[dict[str, object]]], params: object) -> list[object]:
            for chat in chats:
                assert chat[0]["content"][0].keys() >= {"type"}  # type: ignore[index]
                assert [m["content"] for m in chat if m["role"] == "assistant"] == ["1"] * (
                    len(chat) // 2
                )
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=f" {len(chat)}")]) for chat in chats
            ]

    assert ask(Echo(), asked) == [["1", "3"]] * 3  # type: ignore[arg-type]


def test_model_card_has_the_table(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"before\n{CARD_BEGIN}old\n{CARD_END}\nafter\n")
    write_card(card, {"count": 0.5, "where": 1.0}, 0.75)
    text = card.read_text()
    assert "| count | 50.0% |" in text
    assert "| **overall** | **75.0%** |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert CARD_BEGIN in (DEMO / "README.md").read_text()
