"""The tables of ``docs/errors.md``, from the docstrings and codes of the classes."""

import inspect
import re
from pathlib import Path
from types import ModuleType

from idefics2_engine import errors
from idefics2_engine.errors import Idefics2Error
from idefics2_engine.jobs import job_errors
from idefics2_engine.jobs.job_errors import OutputLostError
from idefics2_engine.jobs.job_result import Ending, JobResult, RowCounts

PAGE = Path(__file__).resolve().parents[2] / "docs/errors.md"
_TABLE = re.compile(r"(<!-- errors: (\w+) -->\n).*?(<!-- /errors -->)", re.DOTALL)
_MODULES = {"engine": errors, "jobs": job_errors}
_BAD_INPUT = 2


def classes_of(module: ModuleType) -> dict[str, type[Idefics2Error]]:
    """Return the error classes that ``module`` defines, by their names."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Idefics2Error)
        and value.__module__ == module.__name__
    }


def error_page() -> str:
    """Return the page with the current tables."""
    text = PAGE.read_text(encoding="utf-8")
    return _TABLE.sub(lambda found: f"{found[1]}{_table(found[2])}{found[3]}", text)


def _table(name: str) -> str:
    exit_code = "exit code of a job" if name == "jobs" else "exit code"
    lines = [f"| class | code | when | {exit_code} |", "|---|---|---|---|"]
    for one, value in classes_of(_MODULES[name]).items():
        lines.append(f"| `{one}` | `{value.code}` | {_when(value)} | {_exit_code(value)} |")
    return "\n".join(lines) + "\n"


def _when(value: type[Idefics2Error]) -> str:
    """Return the docstring up to its first section, with the parent unless it is the base."""
    text = inspect.cleandoc(value.__doc__ or "").split("\n\nAttributes:")[0]
    text = " ".join(text.split()).replace("``", "`").rstrip(".")
    (parent,) = value.__bases__
    if parent in (ValueError, Idefics2Error, job_errors.JobError):
        return text
    return f"`{parent.__name__}`: {text[0].lower()}{text[1:]}"


def _exit_code(value: type[Idefics2Error]) -> int:
    if value is OutputLostError:
        return JobResult(Ending.OUTPUT_LOST, RowCounts()).exit_code
    return _BAD_INPUT
