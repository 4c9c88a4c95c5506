"""Error classes: their table in docs/errors.md, their codes, and transfer between processes."""

import pickle
import re

import pytest

from idefics2_engine import errors
from idefics2_engine.errors import Idefics2Error, PromptError, PromptTooLongError
from paths import ROOT

PAGE = ROOT / "docs/errors.md"
CLASSES: dict[str, type[Idefics2Error]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Idefics2Error)
}


def table() -> dict[str, tuple[str, str, str]]:
    """Return code, occasion and exit code by class."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (\d+) \|$", page, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (code, when, exit_code) for name, code, when, exit_code in rows}


def test_table_lists_every_class_with_its_code() -> None:
    assert {name: code for name, (code, _, _) in table().items()} == {
        name: value.code for name, value in CLASSES.items()
    }


def test_classes_share_a_base_and_have_distinct_codes() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = [value for value in classes if issubclass(value, BaseException)]
    raised = [value for value in raised if not issubclass(value, Warning)]
    assert len(raised) >= len(CLASSES)
    assert all(issubclass(value, Idefics2Error) for value in raised)
    assert issubclass(Idefics2Error, ValueError)
    assert len({value.code for value in CLASSES.values()}) == len(CLASSES)
    assert all("code" in vars(value) for value in CLASSES.values()), "none inherits its parent's"
    assert all(re.fullmatch("[a-z_]+", value.code) for value in CLASSES.values())


@pytest.mark.parametrize("name", CLASSES)
def test_exit_codes_match_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from idefics2_engine.cli import generate, main

    error = PromptTooLongError(9, 9) if name == "PromptTooLongError" else CLASSES[name]("what")

    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(generate, "run", fail)
    code, _, exit_code = table()[name]
    assert main.main(["generate", "--prompt", "x", "--json"]) == int(exit_code)
    out, err = capsys.readouterr()
    assert f'"code": "{code}"' in out
    assert err == f"idefics2: error: {error}\n"


def test_prompt_too_long_error_holds_length_and_limit() -> None:
    assert issubclass(PromptTooLongError, PromptError)
    error = PromptTooLongError(14, 12)
    reborn: PromptTooLongError = pickle.loads(pickle.dumps(error))
    for one in (error, reborn):
        assert (one.got, one.limit, one.code) == (14, 11, "prompt_too_long")
        assert str(one) == "prompt must leave room for an answer within 12 tokens, got 14"
