"""The site is built without a warning, needs no network, and its text can be read."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import mkdocs
import pytest

from css_colors import Colors
from page_blocks import pages, text_outside
from paths import ROOT, TESTS

LISTED = TESTS / "data/external_links.txt"
_ADDRESS = re.compile(r"\]\((https?://[^)\s]+)\)|<(https?://[^>\s]+)>")


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    assert mkdocs.__version__.startswith("1.")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, f"make docs: mend what it warns of\n{done.stdout}"
    assert "WARNING" not in done.stdout
    return folder


class Reader(HTMLParser):
    """Collects addresses of what a page loads, and texts of its paragraphs."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.has_viewport = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.linked.append(given.get("href") or "")
        else:
            self.loaded += [
                given[name] or "" for name in ("src", "href", "srcset") if name in given
            ]
        self.has_viewport |= tag == "meta" and given.get("name") == "viewport"


def test_every_page_of_the_checkout_is_in_the_site(site: Path) -> None:
    for page in pages():
        name = str(page.relative_to(ROOT)).removeprefix("docs/")
        moved = {"README.md": "index" if page.parent == ROOT else "contents"}
        name = moved.get(name, name.removesuffix(".md"))
        assert (site / f"{name.replace('README', 'index')}.html").is_file()
    for name in (
        "design/index",
        "design/contributing",
        "changes",
        "source/examples/finetune/qlora.py",
    ):
        assert (site / f"{name}.html").is_file()


def test_pages_load_nothing_from_a_network(site: Path) -> None:
    read = {path: Reader(path) for path in site.rglob("*.html")}
    assert len(read) > 50
    for path, page in read.items():
        assert page.has_viewport, path
        outside = [one for one in page.loaded if re.match(r"(https?:)?//", one)]
        assert not outside, f"{path.name} loads {outside}: a page must need no network"
        for name in page.loaded:
            # The page for addresses that do not exist counts from the root
            folder = site if name.startswith("/") else path.parent
            if name and not name.startswith(("#", "data:")):
                assert (folder / name.lstrip("/")).exists(), f"{path.name} needs {name}"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", styles)


def test_markdown_became_lists_tables_and_code(site: Path) -> None:
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        assert "```" not in html, f"{path.name}: a fence is shown as text"
        for paragraph in re.findall(r"<p>(.*?)</p>", html, re.DOTALL):
            assert not re.search(r"^\s*([-*|]|1\.) ", paragraph, re.MULTILINE), (
                f"{path.name}: put an empty line above the list or table in\n{paragraph}"
            )


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_text_has_a_contrast_of_four_and_a_half(site: Path, scheme: str) -> None:
    # The order in which pages load them
    sheets = [*sorted(site.glob("assets/stylesheets/*.css")), site / "theme/extra.css"]
    colors = Colors("".join(path.read_text(encoding="utf-8") for path in sheets), scheme)
    pairs = [
        ("--md-default-fg-color", "--md-default-bg-color"),
        ("--md-default-fg-color--light", "--md-default-bg-color"),
        # Titles of the navigation on a narrow screen
        ("--md-default-fg-color--light", "--md-default-fg-color--lightest"),
        ("--md-typeset-a-color", "--md-default-bg-color"),
        ("--md-typeset-a-color", "--md-code-bg-color"),
        ("--md-code-fg-color", "--md-code-bg-color"),
        ("--md-footer-fg-color", "--md-footer-bg-color"),
        ("--md-primary-bg-color", "--md-primary-fg-color"),
        *((name, "--md-code-bg-color") for name in colors.names() if "code-hl-" in name),
    ]
    pairs = [pair for pair in pairs if not pair[0].startswith("--md-code-hl-color")]
    assert len(pairs) > 12
    weak = {pair: ratio for pair in pairs if (ratio := colors.contrast(*pair)) < 4.5}
    assert not weak, f"{weak}: set other colors in docs/theme/extra.css"


def test_weak_contrast_is_found() -> None:
    style = ":root{--a:#777;--b:hsla(0,0%,0%,.54);--c:var(--a);--d:#fff}"
    colors = Colors(style, "default")
    assert colors.contrast("--c", "--d") == pytest.approx(4.48, abs=0.01)
    assert colors.contrast("--b", "--d") == pytest.approx(4.59, abs=0.01)


def external_links(page: str) -> set[str]:
    return {a or b for a, b in _ADDRESS.findall(re.sub(r"`[^`\n]*`", "", text_outside(page)))}


def test_external_links_are_listed(site: Path) -> None:
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    found = {link for page in pages() for link in external_links(page.read_text("utf-8"))}
    in_site = {link for path in site.rglob("*.html") for link in Reader(path).linked}
    found |= {link for link in in_site if link.startswith(("http:", "https:"))}
    assert found == listed, f"write the links of the pages into {LISTED.relative_to(ROOT)}"


def test_external_links_are_found() -> None:
    page = "[a](https://x.y/z#b) <http://x.y> `https://no` [c](d.md)\n```\n[e](https://no)\n```\n"
    assert external_links(page) == {"https://x.y/z#b", "http://x.y"}


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("a.md#twoo", "contains a link 'a.md#twoo', but the doc 'a.md' does not contain an anchor"),
        ("c.md", "contains a link 'c.md', but the target is not found"),
        ("/a.md", "contains an absolute link '/a.md'"),
        ("a.md#two-words-here", ""),
    ],
)
def test_broken_link_stops_the_build(link: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# One\n\n[there]({link})\n")
    (tmp_path / "docs/a.md").write_text("# A\n\n## Two `words`, here\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nnav:\nhooks: []\nplugins: []\n"
        "extra_css: []\n"
    )
    done = build(config, tmp_path / "site")
    assert (done.returncode != 0) is bool(message)
    assert message in done.stdout
