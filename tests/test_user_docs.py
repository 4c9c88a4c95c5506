"""Tests of README and docs/: code compiles, commands parse, tables agree with the classes."""

import inspect
import re
import shlex
from argparse import ArgumentParser, _SubParsersAction
from dataclasses import fields
from pathlib import Path

import pytest

from console_blocks import commands
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.cli.command import build_parser
from idefics2_engine.jobs.ray_data import Idefics2ProcessorConfig
from page_blocks import blocks_of
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def rows(page: str, heading: str) -> dict[str, str]:
    """Return the defaults (second column) of a section's table by name (first column)."""
    section = (
        (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    )
    found = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def command_parser(name: str) -> ArgumentParser:
    choices = next(
        action.choices
        for action in build_parser()._actions
        if isinstance(action, _SubParsersAction)
    )
    parser: ArgumentParser = choices[name]
    return parser


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")


@every_page
def test_parser_accepts_every_documented_command(page: Path) -> None:
    for block in blocks_of(page):
        if block.language != "console":
            continue
        for command, _ in commands(block):
            _, found, arguments = command.partition("idefics2 ")
            if not found:
                continue
            # A folder must exist, and a hub id must not
            words = shlex.split(arguments.replace("path/to/", "org/"), comments=True)
            build_parser().parse_args(words)


def test_pages_of_jobs_name_every_option_of_their_commands() -> None:
    pages = (ROOT / "docs").glob("jobs*.md")
    named = set(re.findall(r"--[a-z][a-z-]+", " ".join(page.read_text("utf-8") for page in pages)))
    groups = {"input", "output", "job", "progress", "estimate", "options"}
    for command in ("run", "plan", "merge"):
        for group in command_parser(command)._action_groups:
            if group.title in groups:
                options = {action.option_strings[-1] for action in group._group_actions}
                assert options - named <= {"--help", "--input", "--output"}


def test_benchmarks_name_the_versions_of_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    named = re.findall(r"\b\w+==[\d.]*\d", page)
    assert len(named) == 3
    assert set(named) <= set(constraints)


def test_docs_name_every_argument_of_llm_with_its_default() -> None:
    parameters = inspect.signature(LLM).parameters.values()
    assert rows("docs/offline.md", "Arguments of LLM") == {
        p.name: repr(p.default).replace("'", '"') for p in parameters
    }


def test_docs_name_every_sampling_parameter_with_its_default() -> None:
    params = SamplingParams()
    assert rows("docs/sampling.md", "Parameters") == {
        field.name: repr(getattr(params, field.name)) for field in fields(params)
    }


def test_docs_name_every_field_of_rays_config_with_its_default() -> None:
    config = Idefics2ProcessorConfig()
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    assert rows("docs/jobs-ray.md", "Fields of Idefics2ProcessorConfig") == {
        name: value.__name__ if callable(value) else repr(value) for name, value in values.items()
    }
