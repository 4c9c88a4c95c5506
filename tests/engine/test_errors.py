"""Error classes: their tables in the docs, their codes, and transfer between processes."""

import pickle
import re

import pytest

from error_tables import PAGE, classes_of
from idefics2_engine import errors
from idefics2_engine.errors import (
    Idefics2Error,
    PromptError,
    PromptTooLongError,
    TooManyImagesError,
)
from idefics2_engine.jobs import job_errors
from idefics2_engine.jobs.job_result import Ending, JobResult, RowCounts
from idefics2_engine.jobs.writers.row_error import STAGES
from paths import ROOT

CLASSES = classes_of(errors)
JOB_CLASSES = classes_of(job_errors)


def table() -> dict[str, tuple[str, str, str]]:
    """Return code, occasion and exit code by class."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (\d+) \|$", page, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (code, when, exit_code) for name, code, when, exit_code in rows}


def test_page_of_outputs_lists_every_code_of_a_row_with_its_stage() -> None:
    page = (ROOT / "docs/jobs-output.md").read_text(encoding="utf-8")
    section = page.split("\n## Error rows\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for codes, stages in re.findall(r"^\| (`.+?`) \| (`.+?`) \|", section, re.MULTILINE):
        names, stage_names = (re.findall(r"`(\w+)`", cell) for cell in (codes, stages))
        if len(stage_names) == 1:
            stage_names *= len(names)
        found.update(zip(names, stage_names, strict=True))
    assert found == STAGES


def test_classes_share_a_base_and_have_distinct_codes() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = [value for value in classes if issubclass(value, BaseException)]
    raised = [value for value in raised if not issubclass(value, Warning)]
    assert len(raised) >= len(CLASSES)
    assert all(issubclass(value, Idefics2Error) for value in raised)
    assert issubclass(Idefics2Error, ValueError)
    every = [*CLASSES.values(), *JOB_CLASSES.values()]
    assert len({value.code for value in every}) == len(every)
    assert all("code" in vars(value) for value in every), "none inherits its parent's"
    assert all(re.fullmatch("[a-z_]+", value.code) for value in every)


def test_lost_output_ends_a_job_with_the_exit_code_of_the_table() -> None:
    lost = JobResult(Ending.OUTPUT_LOST, RowCounts())
    assert table()["OutputLostError"][2] == str(lost.exit_code)


# The runner catches OutputLostError
@pytest.mark.parametrize("name", sorted((CLASSES | JOB_CLASSES).keys() - {"OutputLostError"}))
def test_exit_codes_match_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from idefics2_engine.cli import generate, main

    make = (CLASSES | JOB_CLASSES)[name]
    with_lengths: dict[str, Idefics2Error] = {
        "PromptTooLongError": PromptTooLongError(9, 9),
        "TooManyImagesError": TooManyImagesError(9, 9, 1),
    }
    error = with_lengths[name] if name in with_lengths else make("what")

    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(generate, "run", fail)
    code, _, exit_code = table()[name]
    assert main.main(["generate", "--prompt", "x", "--json"]) == int(exit_code)
    out, err = capsys.readouterr()
    assert f'"code": "{code}"' in out
    assert err == f"idefics2: error: {error}\n"


def test_too_many_images_error_is_a_prompt_that_is_too_long() -> None:
    error = TooManyImagesError(130, 128, 2)
    reborn: TooManyImagesError = pickle.loads(pickle.dumps(error))
    for one in (error, reborn):
        assert (one.got, one.limit, one.num_images) == (130, 127, 2)
        assert one.code == "too_many_images"
        assert str(one) == (
            "images must leave room for an answer within 128 tokens, got 2 images and 130 tokens"
        )
    assert isinstance(error, PromptTooLongError)


def test_prompt_too_long_error_holds_length_and_limit() -> None:
    assert issubclass(PromptTooLongError, PromptError)
    error = PromptTooLongError(14, 12)
    reborn: PromptTooLongError = pickle.loads(pickle.dumps(error))
    for one in (error, reborn):
        assert (one.got, one.limit, one.code) == (14, 11, "prompt_too_long")
        assert str(one) == "prompt must leave room for an answer within 12 tokens, got 14"
