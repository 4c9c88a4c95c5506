"""Names of ours in backticks on the pages exist: attributes of public classes, and options."""

import re
from functools import cache
from pathlib import Path

import pytest

from idefics2_engine import LLM, Row, SamplingParams, StructuredOutputsParams
from idefics2_engine.llm_options import LLMOptions
from idefics2_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from idefics2_engine.prompts.processor import Processor
from idefics2_kernels import REFERENCE, TRITON, Ops
from option_tables import commands
from page_blocks import pages, text_outside
from paths import ROOT

OWNERS: dict[str, object] = {
    one.__name__: one
    for one in (
        CompletionOutput, LLM, LLMOptions, Logprob, Ops, Processor, RequestMetrics, RequestOutput,
        Row, SamplingParams, StructuredOutputsParams,
    )
} | {"REFERENCE": REFERENCE, "TRITON": TRITON}  # fmt: skip
# Options of other programs
FOREIGN = {"--extra-index-url", "--include", "--tensor-parallel-size"}
_OWNED = re.compile(rf"\b({'|'.join(OWNERS)})\.(\w+)\b(?![*…])")
# Options of other programs have underscores
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")


@cache
def options() -> set[str]:
    """Return the options of every command, and those of the other programs of the checkout."""
    found = {
        option
        for parser in commands().values()
        for action in parser._actions
        for option in action.option_strings
    }
    for folder in ("bench", "examples", "tests/tools"):
        for path in (ROOT / folder).rglob("*.py"):
            code = path.read_text(encoding="utf-8")
            found.update(re.findall(r'"(--[a-z][a-z0-9-]*)"', code))
            two_forms = re.findall(r'"--([a-z-]+)",\s+action=argparse.BooleanOptionalAction', code)
            found.update(f"--no-{name}" for name in two_forms)
    return found


def has_member(owner: str, name: str) -> bool:
    """Return whether a class has an attribute, a field, or a line for it in its docstring."""
    value = OWNERS[owner]
    described = re.search(rf"^ +{name}: ", value.__doc__ or "", re.MULTILINE)
    return hasattr(value, name) or described is not None


def unknown_names(page: str) -> list[str]:
    """Return the names in backticks that look like ours and do not exist."""
    unknown = []
    for code in re.findall(r"`([^`\n]+)`", text_outside(page)):
        unknown += [f"{a}.{b}" for a, b in _OWNED.findall(code) if not has_member(a, b)]
        unknown += [one for one in _OPTION.findall(code) if one not in options() | FOREIGN]
    return unknown


@pytest.mark.parametrize(
    "page",
    [*pages(), ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_names_exist(page: Path) -> None:
    unknown = unknown_names(page.read_text(encoding="utf-8"))
    assert not unknown, (
        f"{page.relative_to(ROOT)}: there is no {', '.join(unknown)}: write the name that the code has"
    )


def test_unknown_names_are_found() -> None:
    page = (
        "`LLM.iterate` `LLM.iterates` `SamplingParams.top_k` `LLM.stats` `SamplingParams.topk`\n"
        "`--max-tokens 3` `idefics2 run --max-token` `--no-split`\n```\n`--in-code`\n```\n"
    )
    assert unknown_names(page) == ["LLM.iterates", "SamplingParams.topk", "--max-token"]
