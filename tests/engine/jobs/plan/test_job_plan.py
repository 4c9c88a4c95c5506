"""Plans of whole jobs: equal to the run of the demo model, and in memory that rows do not fill."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.job_plan import QUANTITIES, JobPlan, PlanOptions, plan_job
from idefics2_engine.jobs.plan.row_planner import PlannedRow
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.runtime.config import EngineConfig
from paths import DEMO
from pictures import file, noise, oriented
from planned_rows import job_rows, planner, question

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def plan_options(**sizes: Any) -> PlanOptions:
    settings = {"max_model_len": 2048, "max_num_seqs": 4, "kv_cache_tokens": 8192, **sizes}
    return PlanOptions(ModelConfig.load(DEMO).text, EngineConfig(**settings), dtype="float32")


def mixed_rows(folder: Path) -> list[JobRow]:
    (folder / "a.png").write_bytes(file(noise(64, 50), "PNG"))
    pictures: list[Any] = [
        str(folder / "a.png"),
        file(noise(64, 50), "PNG"),
        oriented(noise(100, 30), "JPEG", 6),
        file(noise(20, 90, "RGBA"), "WebP"),
        file(noise(200, 200, "P"), "GIF"),
    ]
    prompts = [question(f"Row {n}?", *pictures[n % 5 : n % 5 + n % 3]) for n in range(20)]
    prompts[7] = question("Missing?", str(folder / "none.png"))
    prompts[12] = question("Large?", file(noise(900, 900), "PNG"))
    prompts[15] = question("word " * 5000)
    return job_rows(prompts, PARAMS)


class WatchedPages:
    """Remembers how many pages of an engine were held at once."""

    def __init__(self, llm: LLM) -> None:
        self.peak = 0
        self._pages = llm.engine.scheduler.pages
        self._allocate = self._pages.allocate
        self._pages.allocate = self.allocate  # type: ignore[method-assign]

    def allocate(self, count: int) -> list[int]:
        taken = self._allocate(count)
        self.peak = max(self.peak, self._pages.num_pages - self._pages.num_free)
        return taken


@pytest.mark.parametrize("split", [False, True])
def test_counts_are_those_of_the_run(split: bool, tmp_path: Path) -> None:
    rows = mixed_rows(tmp_path)
    media: dict[str, Any] = {"allowed_media_root": tmp_path, "max_image_pixels": 500 * 500}
    rules = MediaConfig(**media)
    plan = plan_job(
        planner(DEMO, rules, split=split, max_model_len=2048).plan_batch(rows), plan_options()
    )
    sizes: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 4, "kv_cache_tokens": 8192}
    with LLM(DEMO, device="cpu", split_images=split, **sizes, **media) as llm:
        pages = WatchedPages(llm)
        outputs = list(llm.iterate(row.to_engine() for row in rows))
        image_id, encoded = llm.config.image_token_id, llm.stats.encoded_patches
    answered = [output for output in outputs if output.error is None]
    failed = [output.error.code for output in outputs if output.error is not None]
    data = plan.to_dict()
    assert data["rows"] == {"total": 20, "answered": len(answered), "failing": len(failed)}
    assert sorted(failed) == ["image", "image", "prompt_too_long"]
    assert {code: found["rows"] for code, found in data["failures"].items()} == {
        "image": 2,
        "prompt_too_long": 1,
    }
    prompts = [output.prompt_token_ids for output in answered]
    counts = data["counts"]
    assert counts["prompt_tokens"]["total"] == sum(map(len, prompts))
    assert counts["prompt_tokens"]["max"] == max(map(len, prompts))
    assert counts["image_tokens"]["total"] == sum(ids.count(image_id) for ids in prompts)
    assert counts["max_new_tokens"]["total"] == 6 * len(answered)
    assert counts["images"]["total"] * (5 if split else 1) == counts["tiles"]["total"]
    # Equal tiles of different images are encoded once in the run
    assert encoded <= data["encoded"]["patches"] < counts["patches"]["total"]
    assert 0 < pages.peak <= data["kv_cache"]["peak_pages"]["bound"]


def test_examples_name_place_and_id(tmp_path: Path) -> None:
    rows = job_rows([question("?", str(tmp_path / "none.png"))] * 5)
    media = MediaConfig(allowed_media_root=tmp_path)
    found = plan_job(planner(DEMO, media).plan_batch(rows), plan_options()).to_dict()["failures"][
        "image"
    ]
    assert found["rows"] == 5
    assert [one["place"] for one in found["examples"]] == [f"in.jsonl: line {n}" for n in (1, 2, 3)]
    assert found["examples"][0]["id"] == "row-0"
    assert "no such file" in found["examples"][0]["message"]


def test_longest_prompt_that_does_not_fit_is_told() -> None:
    rows = job_rows([question("word " * n) for n in (10, 5000, 6000)])
    plan = plan_job(
        planner(DEMO, MediaConfig(), max_model_len=2048).plan_batch(rows), plan_options()
    ).to_dict()
    assert plan["rows"]["failing"] == 2
    assert plan["longest_unfit_prompt"] > 6000
    assert plan["max_model_len"] == 2048


def test_expected_tokens_shorten_answers_but_not_the_bound() -> None:
    options = plan_options()
    short = PlanOptions(options.text, options.engine, "float32", expected_tokens=3)
    rows = job_rows([question(f"Row {n}?") for n in range(8)], SamplingParams(max_tokens=600))
    whole, brief = (
        plan_job(planner(DEMO, MediaConfig()).plan_batch(rows), one) for one in (options, short)
    )
    assert whole.work.answers == {600: 8}
    assert brief.work.answers == {3: 8}
    pages = [plan.to_dict()["kv_cache"]["peak_pages"] for plan in (whole, brief)]
    assert pages[0]["bound"] == pages[1]["bound"]
    assert pages[1]["likely"] < pages[0]["likely"]


def test_bytes_follow_from_the_model_and_the_dtype() -> None:
    (row,) = job_rows([question("?")])
    kv = plan_job(planner(DEMO, MediaConfig()).plan_batch([row]), plan_options()).to_dict()[
        "kv_cache"
    ]
    text = ModelConfig.load(DEMO).text
    assert kv["page_bytes"] == 64 * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    assert kv["peak_bytes"]["bound"] == kv["peak_pages"]["bound"] * kv["page_bytes"]


def test_a_job_without_rows_has_a_plan() -> None:
    data = plan_job([], plan_options()).to_dict()
    assert data["rows"] == {"total": 0, "answered": 0, "failing": 0}
    assert set(data["counts"]) == set(QUANTITIES)
    assert data["kv_cache"]["peak_pages"] == {"likely": 0, "bound": 0}


def test_memory_does_not_grow_with_rows() -> None:
    plan = JobPlan(plan_options())

    def add(count: int) -> None:
        for number in range(count):
            names = [number.to_bytes(16, "little")]
            length = 100 + number % 50
            plan.add(PlannedRow(number, "a", "", num_prompt=length, max_tokens=9, page_names=names))

    add(2000)
    tracemalloc.start()
    add(5000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_plan_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from idefics2_engine.images.loader import MediaConfig\n"
        "from planned_rows import job_rows, planner, question\n"
        "row, = job_rows([question('?', Path(sys.argv[3]))])\n"
        "planned = planner(Path(sys.argv[2]), MediaConfig(), split=True).plan(row)\n"
        "assert planned.error is None and len(planned.tiles) == 5, planned\n"
        "assert not {'torch', 'triton'} & sys.modules.keys()\n"
    )
    helpers = Path(__file__).parents[3] / "helpers"
    picture = DEMO.parent / "images" / "shapes.png"
    command = [sys.executable, "-c", program, str(helpers), str(DEMO), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
