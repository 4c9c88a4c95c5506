"""The check of pages: they need no network, no scripts and no fixed width."""

import re


def check_page(content: str) -> None:
    """Assert that a page has all it needs, and is as wide as its reader's screen."""
    assert "http:" not in content
    assert "https:" not in content
    assert not re.search(r"<(script|link|iframe|object)\b", content)
    assert not re.search(r"<[^>]*\s(srcset|style|on\w+)=", content)
    sources = re.findall(r"<[^>]*\s(?:href|src)=\"([^\"]*)", content)
    assert all(re.match(r"data:image/(jpeg|png|webp);base64,", source) for source in sources)
    assert not re.search(r"<[^>]*\s(?:href|src)=[^\"]", content)
    assert "url(" not in content
    assert "@import" not in content
    # Sizes of drawings are those of their places
    assert not re.search(r"<svg[^>]*\s(width|height)=", content)
    style = content[content.index("<style>") : content.index("</style>")]
    assert not re.search(r"(?<!max-)(?<!min-)(?<!stroke-)\bwidth: *[\d.]+px", style)
