"""The demo checkpoint's scenes, questions, tokenizer, files and training."""

import json
import random
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample_images
import train_demo
from chunks import ChunkBuilder
from conversations import Preparer, held_out_seed, messages
from data_workers import DataWorkers, training_jobs
from evaluate_demo import CARD_BEGIN, CARD_END, ask, write_card
from idefics2_engine.batch import ImageBatch, TextBatch
from idefics2_engine.checkpoint import load_checkpoint
from idefics2_engine.config import ModelConfig
from idefics2_engine.model import Idefics2
from idefics2_engine.processor import Processor
from idefics2_engine.prompt import Tokenizer
from idefics2_kernels import REFERENCE
from initial_weights import init_for_training
from questions import ALL_KINDS, KINDS, PAIR_KINDS, Conversation, example, question_of_kind
from rounds import Rounds
from scenes import BACKGROUNDS, COLORS, SHAPES, Scene, random_scene, random_size, render
from trainer import Trainer, image_features
from training_data import Batch, DataSet
from training_ops import TRAINING
from words import WORDS

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = EXAMPLES / "demo"
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACE_WORDS = {
    "top left": 0, "upper left": 0, "top right": 2, "upper right": 2, "bottom left": 6,
    "lower left": 6, "bottom right": 8, "lower right": 8, "top": 1, "bottom": 7, "left": 3,
    "right": 5, "middle": 4, "center": 4,
}  # fmt: skip


# -- scenes


def test_a_scene_follows_from_its_seed() -> None:
    one, other = (example("some seed") for _ in range(2))
    assert one == other
    assert one != example("another seed")
    drawn = [np.array(render(scene)) for scene in one.scenes]
    again = [np.array(render(scene)) for scene in other.scenes]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_items_lie_in_their_cells_and_show() -> None:
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


# -- questions: read each answer again, from the words of question and answer and the scene alone


def matching(scene: Scene, phrase: str) -> list[int]:
    """Cells of the shapes that ``red``, ``circles`` or ``red circle`` means."""
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
    # "in the top middle" is the top: of two plain words the one that is not the middle
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
    if said[1] not in question:  # "what does it say?" has one answer only where there is one text
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


def test_differences_are_told_completely() -> None:
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
        else:  # one item turned into another at its place
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


# -- sample images


def test_sample_images_are_drawn_by_the_script() -> None:
    for name, scene in sample_images.SAMPLES.items():
        with Image.open(EXAMPLES / "images" / name) as image:
            assert image.size == (scene.width, scene.height)
            stored = np.array(image, dtype=int)
        # the last digit may depend on Pillow's release
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


# -- tokenizer and files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_tokenizer_has_few_pieces_in_the_usual_places(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size <= 1000
    assert tokenizer.encode("<unk><s></s>", add_bos=False) == [0, 1, 2]
    assert tokenizer.encode("<0x41>", add_bos=False) != [3 + 0x41]
    assert len(tokenizer.byte_ids()) == 256
    assert ModelConfig.load(DEMO).image_token_id == tokenizer.image_id


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
@hypothesis.example(text=" ")
@hypothesis.example(text="  two spaces")
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _loaded_tokenizer()
    text = text.replace("\ufdd0\ufdd1", "")  # reserved
    # as SentencePiece does: a space goes in front of a text that does not begin with one, and decoding takes one away
    wanted = text.removeprefix(" ")
    assert tokenizer.decode(tokenizer.encode_plain(text)) == wanted


@cache
def _loaded_tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_tokenizer_spells_answers_in_few_pieces(tokenizer: Tokenizer) -> None:
    answer = "The red circle is at the top left."
    assert len(tokenizer.encode_plain(answer)) == 9
    assert tokenizer.encode_plain("407")[-3:] == [tokenizer.encode_plain(d)[-1] for d in "407"]
    assert max(len(tokenizer.encode_plain(word)) for word in WORDS) <= 6


def test_demo_folder_is_a_small_checkpoint() -> None:
    config = ModelConfig.load(DEMO)
    assert (config.vision.head_dim, config.perceiver.head_dim, config.text.head_dim) == (
        72,
        96,
        128,
    )
    assert config.text.sliding_window is not None
    assert config.text.sliding_window <= 256
    Processor.load(DEMO, config)
    generation = json.loads((DEMO / "generation_config.json").read_text())
    tokens = Tokenizer.load(DEMO)
    assert generation["eos_token_id"] == [tokens.eos_id, tokens.end_of_utterance_id]
    assert generation["bad_words_ids"] == [[tokens.fake_image_id], [tokens.image_id]]
    files = [*DEMO.iterdir(), *(EXAMPLES / "images").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000


# -- training sees what inference sees


def test_training_ids_are_those_of_the_chat() -> None:
    preparer = Preparer(DEMO)
    asked = [question_of_kind(kind, f"ids {kind}")[1] for kind in ("word", "two_turn", *PAIR_KINDS)]
    asked += [c for place in range(8) for c in example(f"ids {place}").conversations]
    assert {"talk", *PAIR_KINDS} <= {conversation.kind for conversation in asked}
    assert any(conversation.text_first for conversation in asked)
    for split in (True, False):
        processor = Processor.load(DEMO, preparer.config, split=split)
        decode = processor.tokenizer.decode
        for conversation in asked:
            tokens = preparer.expanded(preparer.tokens(conversation), split)
            images = [Image.new("RGB", (40, 30))] * conversation.num_images
            answers = [answer for _, answer in conversation.turns]
            marked = np.zeros(len(tokens.ids), dtype=bool)
            for turn, answer in enumerate(answers):
                prompt = processor.chat(messages(conversation, answers[:turn]), images).token_ids
                assert tokens.ids[: len(prompt)].tolist() == prompt
                end = len(prompt) + tokens.ids[len(prompt) :].tolist().index(
                    processor.tokenizer.end_of_utterance_id
                )
                assert decode(tokens.ids[len(prompt) : end].tolist()).strip() == answer
                marked[len(prompt) : end + 1] = True
            assert tokens.answers.tolist() == marked.tolist()


@cache
def draw_here() -> DataWorkers:
    return DataWorkers(DEMO, 0)


def make_round(number: int, drawing: DataWorkers | None = None) -> DataSet:
    chunks = (drawing or draw_here()).chunks(training_jobs(1, number, 4))
    return DataSet(chunks, ModelConfig.load(DEMO), torch.device("cpu"))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return make_round(0)


def new_trainer(*arguments: str) -> Trainer:
    options = train_demo.parser().parse_args(["--out", "unused", "--device", "cpu", *arguments])
    return Trainer.new(options, torch.device("cpu"))


def test_training_batches_are_what_the_processor_gives() -> None:
    model = Idefics2(ModelConfig.load(DEMO), REFERENCE)
    init_for_training(model, seed=0)
    preparer = Preparer(DEMO)
    conversation = Conversation("talk", (("What is this?", "A thing."),))
    # two sizes: one where quarters and whole have one grid, one where they have not
    for size in ((300, 260), (130, 130)):
        scene = random_scene(random.Random("batch"), size)
        builder = ChunkBuilder(preparer)
        builder.add_scene(scene.with_items([]))  # rows before, of the same grids
        builder.add(conversation, [builder.add_scene(scene)])
        room = np.zeros(400_000, dtype=np.uint8)
        data = DataSet([(builder.chunk(room), room)] * 2, model.config, torch.device("cpu"))
        for batch in data.in_order(1):
            split = batch.tiles[0].pixels.shape[1] > 1
            prompt = Processor.load(DEMO, model.config, split=split).chat(
                messages(conversation), [render(scene)], add_generation_prompt=False
            )
            with torch.no_grad():
                ours = image_features(model, batch).flatten(0, 1)
                theirs = model.image_features(ImageBatch.from_tiles(prompt.tiles))
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                full = model.loss(batch.text, batch.labels, ours)
                plain = TextBatch.from_ids([prompt.token_ids])
                labels = batch.labels[: len(prompt.token_ids)]
                torch.testing.assert_close(full, model.loss(plain, labels, theirs))


def test_rounds_do_not_depend_on_how_they_are_made() -> None:
    one = make_round(3)
    with closing(DataWorkers(DEMO, 2)) as workers:
        other = make_round(3, workers)
    assert [group.key for group in one.groups] == [group.key for group in other.groups]
    for a, b in zip(one.groups, other.groups, strict=True):
        assert np.array_equal(a.kinds, b.kinds)
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids", "answers", "scenes"))
    assert one.pixels.keys() == other.pixels.keys()
    assert all(torch.equal(one.pixels[grids], other.pixels[grids]) for grids in one.pixels)
    another = make_round(4)
    sums, other_sums = (
        {int(scene.sum()) for scenes in data.pixels.values() for scene in scenes}
        for data in (one, another)
    )
    assert not sums & other_sums


def test_a_small_round_spans_chunks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_round(0)
    monkeypatch.setattr("data_workers._CHUNK", 1)
    cut = make_round(0)
    for a, b in zip(whole.groups, cut.groups, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.scenes, b.scenes)
    assert all(torch.equal(whole.pixels[grids], cut.pixels[grids]) for grids in whole.pixels)


def test_each_step_has_its_round() -> None:
    made: list[int] = []

    def make(number: int) -> DataSet:
        if number == 5:
            raise OSError("no scenes")
        made.append(number)
        return DataSet([], ModelConfig.load(DEMO), torch.device("cpu"))

    with closing(Rounds(make, 3, torch.device("cpu"))) as rounds:
        second = rounds.at(7)
        assert rounds.at(8) is second
        assert rounds.at(9) is not second
        rounds.at(12)
        assert made == [2, 3, 4]
        with pytest.raises(OSError, match="no scenes"):
            rounds.at(15)


@pytest.mark.gpu
def test_rounds_are_whole_on_a_gpu_while_steps_are_queued() -> None:
    device = torch.device("cuda")
    wanted = [
        [p.long().sum().item() for p in make_round(number).pixels.values()] for number in range(4)
    ]

    def make(number: int) -> DataSet:
        chunks = draw_here().chunks(training_jobs(1, number, 4))
        return DataSet(chunks, ModelConfig.load(DEMO), device)

    busy = torch.ones(4096, 4096, device=device)
    sums = []
    with closing(Rounds(make, 1, device)) as rounds:
        for step in range(4):
            pixels = rounds.at(step).pixels
            for _ in range(50):  # still running when the round after next is copied
                busy = (busy @ busy).clamp(max=1)
            sums.append([p.long().sum() for p in pixels.values()])
            del pixels
    assert [[total.item() for total in of_round] for of_round in sums] == wanted


def test_loss_falls(data: DataSet) -> None:
    trainer = new_trainer("--steps", "6", "--rate", "0.1")
    losses = [trainer.train(data.draw(0, step % 2, 2, False)).item() for step in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.finished


def test_images_are_whole_first() -> None:
    trainer = new_trainer("--steps", "100")
    chosen = []
    for trainer.step in range(100):
        chosen.append(trainer.choose(8))
    assert set(chosen[:40]) == {(16, False)}
    assert chosen[40:].count((8, True)) == 52
    assert chosen[40:].count((16, False)) == 8


def test_a_broken_run_goes_on_from_its_last_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str, *arguments: str) -> None:
        sizes = "--steps 3 --batch 1 --round-steps 2 --round-examples 2 --test-per-kind 1"
        command = (
            f"train --out {tmp_path / out} --device cpu --data-workers 0 --log-every 1 {sizes}"
        )
        monkeypatch.setattr("sys.argv", [*command.split(), *arguments])
        train_demo.main()

    def train(trainer: Trainer, batch: Batch) -> torch.Tensor:
        # after the first of two rounds' two steps, with a state from then
        monkeypatch.setattr("train_demo._SAVE_SECONDS", 0.0)
        if trainer.step == 1:
            raise KeyboardInterrupt
        return unbroken(trainer, batch)

    monkeypatch.setattr("train_demo._PRACTICE_BATCHES", 1)
    monkeypatch.setattr("train_demo._TEST_BATCH", 2)
    run("whole")
    printed = capsys.readouterr().out
    assert "step 3 exact, held-out" in printed
    assert "step 3 exact, training" in printed
    assert "finished; wrote" in printed
    report = json.loads((tmp_path / "whole/training.json").read_text())
    assert set(report["exact_match"]["held-out"]) == set(KINDS)
    unbroken = Trainer.train
    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(Trainer, "train", unbroken)
    monkeypatch.setattr("train_demo._SAVE_SECONDS", 1e9)
    run("broken", "--resume")
    assert "resumed at step 1" in capsys.readouterr().out
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_training_operations_compute_what_the_reference_does(data: DataSet) -> None:
    results = []
    for ops in (REFERENCE, TRAINING):
        model = Idefics2(ModelConfig.load(DEMO), ops)
        init_for_training(model, seed=0)
        # the longest of two images, more than the window, and one whole image
        keys = [group.key for group in data.groups]
        longest = data.groups[max(range(len(keys)), key=lambda place: keys[place].length)]
        assert longest.key.length > 192
        whole = next(group for group in data.groups if not group.key.split)
        values = []
        for group in (longest, whole):
            batch = data.batch(group, np.array([0, len(group.ids) - 1]))
            loss = model.loss(batch.text, batch.labels, image_features(model, batch))
            loss.backward()
            values.append(loss.detach())
        results.append((values, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (fused_losses, fused_gradients) = results
    torch.testing.assert_close(fused_losses, losses, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert gradient is not None
        fused = fused_gradients[name]
        assert fused is not None
        assert (fused - gradient).norm() <= 1e-4 * gradient.norm(), name
        assert gradient.norm() > 0, name


def test_equal_lengths_are_demanded() -> None:
    q = torch.ones(5, 2, 4)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="equal length 3, got 5"):
        TRAINING.flash_attention(q, q, q, offsets, 3, causal=True)


def test_training_starts_at_unit_scale(data: DataSet) -> None:
    model = Idefics2(ModelConfig.load(DEMO), TRAINING)
    init_for_training(model, seed=0)
    scales: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(module: object, inputs: object, output: torch.Tensor) -> None:
            scales[name] = output.float().std().item()

        return see

    for name in (
        "vision.layers.3.attention.qkv_proj",
        "text.layers.0.attention.qkv_proj",
        "text.layers.3.attention.qkv_proj",
    ):
        model.get_submodule(name).register_forward_hook(watch(name))
    batch = data.draw(0, 0, 4, True)
    with torch.no_grad():
        features = image_features(model, batch)
        loss = model.loss(batch.text, batch.labels, features)
    assert all(0.7 < scale < 1.4 for scale in (*scales.values(), features.std().item())), scales
    # a first guess that is nearly even over the vocabulary
    assert abs(loss.item() - np.log(960)) < 1
    model.init_weights(0)
    with torch.no_grad():
        model.loss(batch.text, batch.labels, image_features(model, batch))
    assert all(scale < 0.5 for scale in scales.values()), scales  # what it is good for


def test_exported_checkpoint_loads_as_it_was(data: DataSet, tmp_path: Path) -> None:
    trainer = new_trainer("--steps", "1")
    trainer.export(DEMO, tmp_path)
    loaded = load_checkpoint(tmp_path, TRAINING, dtype=torch.bfloat16)
    rounded = trainer.model.to(torch.bfloat16)
    batch = data.draw(0, 0, 1, True)
    with torch.no_grad():
        logits = [model(batch.text, image_features(model, batch)) for model in (loaded, rounded)]
    assert torch.equal(*logits)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 16_000_000


def test_exact_match_counts_whole_answers(data: DataSet) -> None:
    trainer = new_trainer("--steps", "1")
    batches = list(data.in_order(64))[::5]
    exact = trainer.exact_match(batches)
    kinds = [ALL_KINDS[kind] for batch in batches for kind in batch.kinds]
    assert list(exact) == sorted(set(kinds))
    assert all(share == 0 for share in exact.values())  # an untrained model knows nothing

    class Oracle(torch.nn.Module):
        """Says every label, in one conversation of three a wrong last one."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.device, self.dtype = torch.device("cpu"), torch.float32
            self.seen = 0
            self.wrong = 0

        def encode(self, *args: object) -> torch.Tensor:
            return self.inner.encode(*args)  # type: ignore[operator, no-any-return]

        def __call__(self, text: TextBatch, features: torch.Tensor) -> torch.Tensor:
            rows = text.input_ids.view(-1, text.max_seqlen)
            following = rows.roll(-1, 1)
            for row in range(len(rows)):
                if (self.seen + row) % 3 == 0:
                    following[row] = 0
                    self.wrong += 1
            self.seen += len(rows)
            return torch.nn.functional.one_hot(following.flatten(), 960).float()

    oracle = Oracle(trainer.model)
    trainer.model = oracle  # type: ignore[assignment]
    exact = trainer.exact_match(batches)
    right = sum(exact[kind] for kind in kinds)
    assert round(right) == oracle.seen - oracle.wrong


# -- evaluation


def test_evaluation_asks_the_second_question_after_the_models_own_answer() -> None:
    asked = [question_of_kind("two_turn", f"ask {place}") for place in range(3)]

    class Echo:
        """Answers with the number of messages it got."""

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


def test_card_gets_its_table(tmp_path: Path) -> None:
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
