"""Paths of the demo checkpoint and its images, in an installed package or a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "demo").is_dir()
_EXAMPLES = _PACKAGE.parents[1] / "examples"

DEMO_MODEL = _PACKAGE / "demo" if _INSTALLED else _EXAMPLES / "demo"
DEMO_IMAGES = _PACKAGE / "demo_images" if _INSTALLED else _EXAMPLES / "images"
