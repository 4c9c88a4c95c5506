"""Ray Data: rows of a dataset answered by actors, some of which die."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.jobs.ray_data import (
    Idefics2Engine,
    Idefics2ProcessorConfig,
    build_processor,
)
from idefics2_engine.jobs.ray_data.columns import PACKED, pack, row_inputs
from ray_stand_in import Crowd, DemoKilledOnce, StandIn, logged

pytest.importorskip("ray.data", reason="Ray is not installed: pip install '.[ray]'")

import pyarrow as pa
import ray

from ray_cluster import local_ray

# What Ray does to itself
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
]

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray():
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield


def stand_in(folder: Path, **options: Any) -> Idefics2ProcessorConfig:
    return Idefics2ProcessorConfig(
        model_source=str(folder), build=StandIn, num_gpus=0, batch_size=8, **options
    )


def prompts(*texts: str) -> "ray.data.Dataset":
    return ray.data.from_items([{"prompt": text} for text in texts])


def is_arrow(schema: Any) -> bool:
    """Return whether no column is of pickled objects."""
    return isinstance(schema.base_schema, pa.Schema) and not any(
        isinstance(kind, pa.BaseExtensionType) for kind in schema.types
    )


def test_a_killed_actor_and_bad_pictures_cost_no_other_row(tmp_path: Path) -> None:
    picture = (DEMO_IMAGES / "shapes.png").read_bytes()

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        image = picture[: -1 if row["id"] % 20 else 40]
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "Where is the star?"}]
        return {"messages": [{"role": "user", "content": parts}], "sampling_params": GREEDY}

    config = Idefics2ProcessorConfig(
        model_source=str(tmp_path),
        engine_kwargs={"kill_at": 150, "device": "cpu"},
        build=DemoKilledOnce,
        batch_size=16,
    )
    process = build_processor(
        config, preprocess, lambda row: {"answer": row["generated_text"], **row}
    )
    dataset = process(ray.data.range(400)).materialize()
    assert is_arrow(dataset.schema())
    rows = dataset.take_all()
    assert (tmp_path / "killed").exists()
    assert sorted(row["id"] for row in rows) == list(range(400))
    for row in rows:
        if row["id"] % 20:
            assert row["answer"] == "The star is at the top right."
            assert row["num_input_tokens"] == len(row["prompt_token_ids"]) == 100
            assert row["num_generated_tokens"] == len(row["generated_tokens"]) == 9
            assert row["messages"][0]["content"][0]["image"] == picture[:-1]
            assert row["__inference_error__"] == row["error_code"] == ""
        else:
            assert row["error_code"] == "image"
            assert row["__inference_error__"].startswith("image bytes:")
            assert row["generated_text"] == ""


def test_rows_that_kill_their_actor_are_errors_of_their_own(tmp_path: Path) -> None:
    # Ray's own form, whose batches are of NumPy and whose tasks are repeated without end
    dataset = prompts(*(f"row {i}" for i in range(30)), "poison a", "poison b").map_batches(
        Idefics2Engine,
        fn_constructor_kwargs={"model_source": str(tmp_path), "build": StandIn},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=16,
    )
    rows = dataset.take_all()
    answers = Counter((row["generated_text"], row["error_code"]) for row in rows)
    assert answers == {
        **{(f"ROW {i}", ""): 1 for i in range(30)},
        ("", "worker_lost"): 2,
    }
    # Twice with others and once alone
    assert Counter(logged(tmp_path))["poison a"] == Counter(logged(tmp_path))["poison b"] == 3


def test_a_poison_row_ends_within_three_retries(tmp_path: Path) -> None:
    config = stand_in(tmp_path, deaths_folder=str(tmp_path))
    rows = build_processor(config)(prompts("a", "poison", "b")).take_all()
    assert {row["error_code"] for row in rows if row["generated_text"]} == {""}
    assert [row["error_code"] for row in rows if not row["generated_text"]] == ["worker_lost"]
    assert Counter(logged(tmp_path))["poison"] == config.max_task_retries


def test_bad_rows_are_error_rows_that_do_not_pass_postprocess(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {
        "text": {"messages": [{"role": "user", "content": "text"}]},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]},
        "number": {"messages": 5},
        "both": {"messages": [], "prompt": "text"},
        "none": {},
        "half a pair": {"prompt": "\ud800"},
        "set": {"prompt": {1, 2}},
        "pixels": {"prompt": "<image>", "image": pa.array([1]).to_numpy()},
        "bad": {"prompt": "bad"},
        "hot": {"prompt": "text", "sampling_params": {"temperature": "hot"}},
        "unknown": {"prompt": "text", "sampling_params": {"heat": 1}},
        "two": {"prompt": "text", "sampling_params": {"n": 2}},
        "keys": {"prompt": "text", "sampling_params": {"logit_bias": {5: 1, "a": 2}}},
        "bias": {"prompt": "text", "sampling_params": {"logit_bias": {5: 1.0}, "stop": None}},
    }
    process = build_processor(
        stand_in(tmp_path),
        lambda row: shapes[row["id"]],
        lambda row: {"id": row["id"], "answer": row["generated_text"]},
    )
    dataset = process(ray.data.from_items([{"id": name} for name in shapes])).materialize()
    assert is_arrow(dataset.schema())
    rows = {row["id"]: row for row in dataset.take_all()}
    assert rows.keys() == shapes.keys()
    good = {name for name, row in rows.items() if row["answer"]}
    assert good == {"text", "parts", "half a pair", "bias"}
    assert all(rows[name]["__inference_error__"] == "" for name in good)
    codes = {name: row["error_code"] for name, row in rows.items() if name not in good}
    assert codes == dict.fromkeys(("number", "both", "none", "set", "pixels", "bad"), "prompt") | (
        dict.fromkeys(("hot", "unknown", "two", "keys"), "sampling")
    )
    assert "a picture must be the bytes of its file" in rows["pixels"]["__inference_error__"]


def test_an_error_ends_the_execution_on_request(tmp_path: Path) -> None:
    process = build_processor(stand_in(tmp_path, should_continue_on_error=False))
    with pytest.raises(Exception, match="prompt must be good"):
        process(prompts("a", "bad")).take_all()


def test_batches_of_an_actor_overlap() -> None:
    config = Idefics2ProcessorConfig(
        build=Crowd, engine_kwargs={"size": 20}, num_gpus=0, batch_size=4
    )
    # Eight batches, each in a task of its own, of which five must be in flight
    dataset = ray.data.range(32, override_num_blocks=8)
    rows = build_processor(config, lambda row: {"prompt": "text"})(dataset).take_all()
    assert {(row["generated_text"], row["__inference_error__"]) for row in rows} == {("CROWD", "")}


def test_columns_of_the_dataset_are_carried(tmp_path: Path) -> None:
    items = [{"prompt": "a", "image": b"bytes", "more": [1, 2], "sampling_params": GREEDY}]
    (row,) = build_processor(stand_in(tmp_path))(ray.data.from_items(items)).take_all()
    # The prompt is the one that the engine used
    assert {name: row[name] for name in items[0]} == items[0]
    assert row["generated_text"] == "A"
    assert row["metrics"] == {"arrival_time": 1.0, "first_token_time": 2.0, "finished_time": 3.0}


def test_inputs_of_preprocess_replace_those_of_the_dataset() -> None:
    messages = [{"role": "user", "content": "Where?"}]
    items: list[dict[str, Any]] = [
        {"id": 0, "prompt": "What?", "image": "a.jpg"},
        {"id": 1, "messages": messages},
    ]
    made: list[dict[str, Any]] = [{"messages": messages}, {"prompt": "Who?"}]
    packed = [{**item, PACKED: pack(inputs)} for item, inputs in zip(items, made, strict=True)]
    first, second = packed
    assert row_inputs(pa.Table.from_pylist([first])) == [{"id": 0, "messages": messages}]
    assert row_inputs(pa.Table.from_pylist([second])) == [{"id": 1, "prompt": "Who?"}]


def test_a_dataset_with_prompts_may_be_asked_with_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Where?"}]
    process = build_processor(stand_in(tmp_path), lambda row: {"messages": messages})
    (row,) = process(prompts("What?")).take_all()
    assert row["__inference_error__"] == ""
