"""MkDocs hooks: pages and files of the checkout outside ``docs/`` become part of the site.

Links on pages are those of the checkout, so that they work on a git host. Here they are changed to
the places in the site. Python files that are linked become pages, other files are copied.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Where a page of the checkout is in the site, if not at its place below docs/
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "DESIGN.md": "design/index.md",
    "CONTRIBUTING.md": "design/contributing.md",
    "CHANGELOG.md": "changes.md",
    "examples/demo/README.md": "source/examples/demo/README.md",
}
FOLDERS = {"docs/design": "design/index.md"}
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of ``PAGES`` and every file outside ``docs/`` that a page links to."""
    files.remove(files.src_uris["README.md"])
    for source, target in PAGES.items():
        _add_page(files, config, target, (ROOT / source).read_text(encoding="utf-8"))
    for source in sorted(set(_linked_sources(files))):
        path = ROOT / source
        if path.suffix == ".py":
            code = path.read_text(encoding="utf-8")
            text = f"# {source}\n\n```python\n{code}```\n"
            _add_page(files, config, _place(source), text)
        elif path.is_file():
            file = File.generated(config, f"source/{source}", content=path.read_bytes())
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links of the checkout by those of the site."""
    source = _source(page.file.src_uri)
    begin = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return posixpath.relpath(_place(target), begin or ".")

    return _LINK.sub(moved, markdown)


def _add_page(files: Files, config: MkDocsConfig, uri: str, text: str) -> None:
    files.append(File.generated(config, uri, content=text))


def _linked_sources(files: Files) -> Iterator[str]:
    """Yield the files outside ``docs/`` that pages link to, by their paths in the checkout."""
    for file in list(files.documentation_pages()):
        folder = posixpath.dirname(_source(file.src_uri))
        for link in _LINK.findall(file.content_string):
            source = posixpath.normpath(posixpath.join(folder, link))
            if source not in PAGES and not source.startswith("docs/"):
                yield source


def _place(source: str) -> str:
    """Return where a file of the checkout is in the site."""
    if source in PAGES:
        return PAGES[source]
    if source in FOLDERS:
        return FOLDERS[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"source/{source}.md" if source.endswith(".py") else f"source/{source}"


def _source(uri: str) -> str:
    """Return the path in the checkout of a page of the site."""
    for source, target in PAGES.items():
        if target == uri:
            return source
    return f"docs/{uri}"
