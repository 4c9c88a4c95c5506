"""Paths of files and folders in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo"
EIGHT_B = TESTS / "data" / "idefics2-8b"
"""The files of idefics2-8b without its weights."""
