"""Tests of the table of ``--show``."""

from idefics2_engine.cli.answer_table import answer_table
from idefics2_engine.jobs.job_row import JobRow


def test_table_fits_the_terminal() -> None:
    row = JobRow(index=0, number=0, id="a" * 8, key="", place="", prompt="b" * 50)
    out = {"error": None, "outputs": [{"text": "c" * 80}]}
    assert max(map(len, answer_table([(row, out)]))) == 8 + 2 + 50 + 2 + 60
    lines = answer_table([(row, out)], line_width=80)
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1] == f"{'a' * 8}  {'b' * 33}…  {'c' * 33}…"
