"""The table of ``--show``: ids, questions and answers of a job's first rows, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics2_engine.jobs.job_row import JobRow

_HEAD = ("id", "question", "answer")
_GAP = "  "
_LEAST_CHARACTERS = 10
_MOST_CHARACTERS = 60


def answer_table(
    rows: Sequence[tuple[JobRow, Mapping[str, Any]]], line_width: int | None = None
) -> list[str]:
    """Return the lines of a table of rows, each with its row of the output.

    Args:
        rows: The rows.
        line_width: Characters of a line of the terminal. ``None`` if it is not one.
    """
    cells = [_HEAD, *((str(row.id), _question(row), _answer(out)) for row, out in rows)]
    widths = [min(_MOST_CHARACTERS, max(map(len, column))) for column in zip(*cells, strict=True)]
    if line_width is not None:
        room = line_width - len(_GAP) * (len(widths) - 1)
        while sum(widths) > room and max(widths) > _LEAST_CHARACTERS:
            widths[widths.index(max(widths))] -= 1
    lines = [
        _GAP.join(
            _short(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    return [lines[0], _GAP.join("-" * width for width in widths), *lines[1:]]


def _question(row: JobRow) -> str:
    """Return the text of a row's last message or of its prompt."""
    prompt: Any = row.prompt
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if isinstance(prompt, Mapping):
        return str(prompt.get("prompt", "token ids"))
    content = prompt[-1].get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return str(content or "")
    texts = (part.get("text") for part in content if isinstance(part, Mapping))
    return " ".join(text for text in texts if isinstance(text, str))


def _answer(out: Mapping[str, Any]) -> str:
    if (error := out["error"]) is not None:
        return f"{error['code']}: {error['message']}"
    return " / ".join(answer["text"] for answer in out["outputs"])


def _short(text: str, width: int) -> str:
    """Return ``text`` on one line of ``width`` characters, without what a terminal would obey."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= width else f"{line[: width - 1]}…"
