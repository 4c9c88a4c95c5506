"""Tokenizers that are loaded once, because one takes ten times as long to load as a tiny model."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from idefics2_engine.prompts.tokenizer import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
# The largest file of a checkpoint here has 2 MB
_LARGEST = 10**7
_loaded: dict[tuple[str, ...], Tokenizer] = {}


@contextmanager
def tokenizers_loaded_once() -> Iterator[None]:
    """Let ``Tokenizer.load`` return the same tokenizer for files with the same bytes."""
    plain = Tokenizer.load

    def load(folder: Path) -> Tokenizer:
        files = [folder / name for name in FILES]
        if not all(file.is_file() and file.stat().st_size <= _LARGEST for file in files):
            return plain(folder)
        key = tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        if key not in _loaded:
            tokenizer = plain(folder)
            # Tests with many tokenizers need each of them once
            if len(_loaded) == 8:
                _loaded.pop(next(iter(_loaded)))
            _loaded[key] = tokenizer
        return _loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", load)
        yield
