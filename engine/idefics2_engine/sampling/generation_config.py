"""The checkpoint's ``generation_config.json``: end tokens and bad words."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from idefics2_engine.errors import ConfigError, short_repr
from idefics2_engine.json_file import read_json_if_there
from idefics2_engine.prompts.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationConfig:
    """End tokens and bad words of a checkpoint."""

    eos_token_ids: frozenset[int]
    bad_words_ids: tuple[tuple[int, ...], ...]

    @classmethod
    def load(cls, folder: Path) -> "GenerationConfig":
        """Read ``folder/generation_config.json``; without the file, both are empty.

        Raises:
            ConfigError: A value of the file is not made of token ids.
        """
        path = folder / "generation_config.json"
        values = read_json_if_there(path)
        eos = values.get("eos_token_id")
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        bad_words = values.get("bad_words_ids") or []
        if not _are_ids(eos):
            raise ConfigError(f"{path}: eos_token_id must be token ids, got {short_repr(eos)}")
        if not isinstance(bad_words, list) or not all(map(_are_ids, bad_words)):
            raise ConfigError(
                f"{path}: bad_words_ids must be lists of token ids, got {short_repr(bad_words)}"
            )
        return cls(frozenset(eos), tuple(tuple(word) for word in bad_words if word))

    @classmethod
    def of_checkpoint(cls, folder: Path, tokenizer: Tokenizer) -> "GenerationConfig":
        """Return the end tokens and bad words of the checkpoint in ``folder``.

        The tokens of images are always bad words.

        Raises:
            ConfigError: As in ``load``.
        """
        ends = [id for id in (tokenizer.eos_id, tokenizer.end_of_utterance_id) if id is not None]
        never = ((tokenizer.fake_image_id,), (tokenizer.image_id,))
        return cls.load(folder).with_defaults(ends, never)

    def with_defaults(
        self, eos_token_ids: Iterable[int], bad_words_ids: Iterable[tuple[int, ...]]
    ) -> "GenerationConfig":
        """Use ``eos_token_ids`` if the file has none, and add ``bad_words_ids``."""
        bad_words = dict.fromkeys((*self.bad_words_ids, *bad_words_ids))
        return GenerationConfig(self.eos_token_ids or frozenset(eos_token_ids), tuple(bad_words))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
