"""The table of arguments in the documentation, against transformers' signatures."""

import inspect
import re
import tomllib
from typing import Any

import pytest
import transformers

from idefics2_engine.hf import Idefics2ForConditionalGeneration, Idefics2ImageProcessor
from idefics2_engine.hf.generation import obstacles
from paths import ROOT

# Of every config of transformers
COMMON = set(inspect.signature(transformers.PreTrainedConfig.__init__).parameters)


def test_releases_are_those_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = project["optional-dependencies"]["transformers"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    oldest = extra.removeprefix("transformers>=")
    (newest,) = re.findall(r"^transformers==(\d+\.\d+)", constraints, re.MULTILINE)
    page = (ROOT / "docs/coming-from-transformers.md").read_text(encoding="utf-8")
    assert f"transformers=={oldest}.0" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f"is tested with {oldest} and {newest}" in " ".join(page.split())


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "kwargs"}


def undocumented(names: set[str], text: str) -> set[str]:
    return names - set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize(
    "names",
    [
        parameters(transformers.Idefics2Model.forward),
        parameters(Idefics2ForConditionalGeneration.forward),
        parameters(Idefics2ForConditionalGeneration.generate),
        parameters(transformers.Idefics2Processor.__init__),
        parameters(transformers.Idefics2Processor.__call__),
        parameters(transformers.Idefics2Config.__init__) - COMMON,
        {"images", *Idefics2ImageProcessor.valid_kwargs.__annotations__},
    ],
    ids=["model", "forward", "generate", "processor", "call", "config", "images"],
)
def test_every_argument_is_in_the_table(names: set[str]) -> None:
    page = (ROOT / "docs/coming-from-transformers.md").read_text(encoding="utf-8")
    table = page.split("| class and method |")[1]
    assert undocumented(names, table) == set()
    assert undocumented({*names, "another"}, table) == {"another"}


def test_every_obstacle_of_the_engine_is_on_the_page() -> None:
    page = (ROOT / "docs/coming-from-transformers.md").read_text(encoding="utf-8")
    table = page.split("## generate on the engine")[1].split("## Rules")[0]
    callers = {*obstacles.CALLERS} - {"logits_processor", "stopping_criteria"}
    # Those of processes and of guidance are in the table of arguments
    callers -= {"synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask"}
    assert undocumented({*callers, *obstacles.OUTPUTS}, table) == set()


def test_public_methods_of_the_class_are_transformers_or_documented() -> None:
    page = (ROOT / "docs/coming-from-transformers.md").read_text(encoding="utf-8")
    own = vars(Idefics2ForConditionalGeneration)
    theirs = dir(transformers.Idefics2ForConditionalGeneration)
    added = [name for name in own if not name.startswith("_") and name not in theirs]
    assert sorted(added) == ["engine", "generation_backend", "rules"]
    assert all(f"model.{name}" in page for name in added)
