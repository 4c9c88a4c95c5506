"""The page of a job: its figures, its rows, and pictures that are read by the rules for images."""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.images.loader import media_config
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.shadow.row_choice import ChosenRow
from idefics2_engine.jobs.shadow.shadow_figures import shadow_figures
from idefics2_engine.jobs.shadow.shadow_rows import ShadowRun
from idefics2_engine.jobs.writers.report import write_report
from idefics2_engine.jobs.writers.row_error import make_row_error
from idefics2_engine.jobs.writers.row_output import SaveOptions, encode_answer, encode_error
from idefics2_engine.jobs.writers.summary import RunFigures, summary_of
from job_outputs import Totals, completion, job_row, request_output
from pictures import file, noise

Pair = tuple[JobRow, Mapping[str, Any]]


def question(*images: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answered(number: int, prompt: Any, *answers: Any) -> Pair:
    row = job_row(number, prompt=prompt)
    return row, json.loads(encode_answer(row, request_output(*answers), SaveOptions()))


def failed(number: int, code: str, message: str, prompt: Any = None) -> Pair:
    row = job_row(number, prompt=prompt)
    return row, json.loads(encode_error(row, make_row_error(code, message)))


def summary(rows: int, errors: int = 0, earlier: int = 0, seconds: float = 2.0) -> dict[str, Any]:
    counts = Counter(image=errors) if errors else Counter[str]()
    job = Totals(rows, counts, 3, 1200, 64, 40)
    return summary_of(job, Totals(rows - earlier, images=3), RunFigures(seconds))


def report(tmp_path: Path, pairs: list[Pair], figures: dict[str, Any] | None = None) -> str:
    path = tmp_path / "report.html"
    media = media_config(allowed_media_root=tmp_path)
    figures = figures or summary(len(pairs))
    write_report(path, pairs, figures, media, title="out.jsonl", fingerprint="f1")
    return path.read_text()


def thumbnails(page: str) -> list[Image.Image]:
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


def test_rows_have_pictures_questions_and_answers(tmp_path: Path) -> None:
    noise(900, 450).save(tmp_path / "a.png")
    pairs = [
        answered(0, question(str(tmp_path / "a.png"), file(noise(9, 7), "PNG")), completion()),
        answered(1, {"prompt": "<image>raw", "multi_modal_data": {"image": noise(5, 5)}}),
        answered(2, "text <b>alone</b>", completion(0, "Yes."), completion(1, "")),
    ]
    page = report(tmp_path, pairs)
    # The larger side is bounded, and a small picture stays as it is
    assert [image.size for image in thumbnails(page)] == [(320, 160), (9, 7), (5, 5)]
    for text in ("row-0", "What is this?", "A star.", "&lt;image&gt;raw", "All rows."):
        assert text in page
    assert "text &lt;b&gt;alone&lt;/b&gt;" in page
    assert re.findall(r"answer \d", page) == ["answer 1", "answer 2"]
    assert "no text" in page


def test_turns_have_roles(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *question(text="Why?")]
    page = report(tmp_path, [answered(0, turns)])
    assert re.findall(r">(system|Be brief\.|user|Why\?)<", page) == [
        *("system", "Be brief."),
        *("user", "Why?"),
    ]


def test_errors_are_shown(tmp_path: Path) -> None:
    missing = question(str(tmp_path / "missing.png"))
    pairs = [
        failed(0, "image", "images[0]: missing.png: no such file", missing),
        failed(1, "json", "the line must be JSON"),
        answered(2, question()),
    ]
    page = report(tmp_path, pairs, summary(3, errors=2))
    assert page.count('<tr class="bad">') == 2
    assert "images[0]: missing.png: no such file" in page
    assert "picture cannot be read" in page
    # A row that cannot be parsed has its place
    assert "in.jsonl: line 2" in page
    assert "66.7% of the rows" in page
    assert "<td" in page.partition("<h2>Errors</h2>")[2].partition("<h2>Rows</h2>")[0]
    assert "<h2>Errors</h2>" not in report(tmp_path, [answered(0, question())])


def test_pictures_are_read_by_the_rules(tmp_path: Path) -> None:
    """Neither a file outside of the folder nor a URL is opened."""
    root = tmp_path / "in"
    root.mkdir()
    noise(9, 9).save(tmp_path / "secret.png")
    sources = [str(tmp_path / "secret.png"), "https://example.org/a.png", "http://127.0.0.1/"]
    page = report(root, [answered(0, question(*sources))])
    assert thumbnails(page) == []
    assert page.count("picture cannot be read") == 1
    assert page.count("picture at a URL") == 2


def test_many_pictures_and_long_texts_are_cut(tmp_path: Path) -> None:
    data = file(noise(5, 5), "PNG")
    pair = answered(0, question(*[data] * 15), completion(text="x" * 5000))
    page = report(tmp_path, [pair])
    assert len(thumbnails(page)) == 12
    assert "and 3 more" in page
    assert "x" * 4000 + "… (1,000 more characters)" in page


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    def pairs() -> Iterator[Pair]:
        for number in range(5):
            yield answered(number, question())
        raise AssertionError("no further row may be read")

    path = tmp_path / "a.html"
    write_report(path, pairs(), summary(5000), media_config(), title="t", max_rows=5)
    page = path.read_text()
    assert "The first 5 of 5,000." in page
    assert page.count("<tr") == 6


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.04, "2.0 s"), (61.0, "1 min 1 s"), (7260.4, "2 h 1 min")]
)
def test_figures_are_on_top(seconds: float, shown: str, tmp_path: Path) -> None:
    page = report(tmp_path, [], summary(1000, seconds=seconds))
    values = re.findall(r'<dd class="value">([^<]*)<', page)
    assert values == ["1,000", "0", "3", "1,200", "40", shown]


def test_rates_are_not_those_of_earlier_runs(tmp_path: Path) -> None:
    assert "500 rows/s" in report(tmp_path, [], summary(1000))
    page = report(tmp_path, [], summary(1000, earlier=400))
    assert "400 rows are of earlier runs" in page
    assert "rows/s" not in page


def test_page_replaces_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("of the user")
    report(tmp_path, [])
    assert (tmp_path / "report.html.1").read_text() == "of the user"
    report(tmp_path, [])
    assert not (tmp_path / "report.html.2").exists()


def test_equal_rows_give_an_equal_page(tmp_path: Path) -> None:
    pairs = [answered(0, question(file(noise(50, 40), "PNG")))]
    assert report(tmp_path, pairs) == report(tmp_path, pairs)


def compared(**agreement: Any) -> dict[str, Any]:
    found = TokenAgreement(**agreement)
    chosen = ChosenRow(0.1, job_row(3), ((1, 2),), found)
    return shadow_figures([chosen, ChosenRow(0.2, job_row(4), ((5,),))])


def with_shadow(figures: dict[str, Any]) -> dict[str, Any]:
    found = summary(1) | {"shadow": figures}
    found["run"]["shadow"] = ShadowRun(seconds=1.0, compared=1, skipped=1)._asdict()
    return found


def test_rows_on_the_reference_path_are_shown(tmp_path: Path) -> None:
    figures = compared(tokens=30_000, same_best=29_999, largest_kl=0.125, largest_margin=0.0625)
    page = report(tmp_path, [answered(0, "?")], with_shadow(figures))
    for text in ("Reference agrees", "on 30,000 tokens", "Compared with the reference path"):
        assert text in page
    # It is all of them only if it is 1
    assert "&gt; 99.99% of 30,000" in page
    assert "1 of 2 chosen rows compared (1 skipped: 2 % of the time was used), 30000 tokens" in page
    assert '<div class="bad"><dt>Reference' not in page
    broken = compared(tokens=2, not_finite=2)
    page = report(tmp_path, [answered(0, "?")], with_shadow(broken))
    assert '<div class="bad"><dt>Reference' in page
    assert "2 tokens have logits that are not finite" in page


def test_without_compared_rows_there_is_no_table(tmp_path: Path) -> None:
    page = report(tmp_path, [answered(0, "?")], with_shadow(shadow_figures([])))
    assert "eference" not in page
