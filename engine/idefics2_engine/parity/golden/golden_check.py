"""The comparison of a path's answers with those of a golden file."""

import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_engine.errors import ConfigError
from idefics2_engine.llm_options import model_folder
from idefics2_engine.model_files import printable_path
from idefics2_engine.parity import stages
from idefics2_engine.parity.golden.golden_file import GoldenCase, GoldenFile
from idefics2_engine.parity.inputs import Case, Processors
from idefics2_engine.parity.paths import Path
from idefics2_engine.parity.recording.case_recording import CaseRecording
from idefics2_engine.parity.recording.record import record
from idefics2_engine.prompts.tokenizer import Tokenizer

_NF4 = "nf4"


@dataclass(frozen=True)
class GoldenResult:
    """How the answer to one case compares.

    Attributes:
        name: Name of the case.
        text: The answer.
        parts_at: Index of the first token that is not the golden answer's, if any.
        tokens: Texts of this token in the answer and in the golden one. ``None`` where an answer
            has ended, and for the golden one if only its text is known.
        golden_text: The golden answer.
        golden_logprob: Log probability with which the golden token was published, if it was.
        skipped: Why the case was not computed, if so.
    """

    name: str
    text: str = ""
    parts_at: int | None = None
    tokens: tuple[str | None, str | None] = (None, None)
    golden_text: str = ""
    golden_logprob: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class GoldenComparison:
    """The result of ``check_golden``.

    Attributes:
        a: Path, dtype, model and versions.
        golden: The golden file.
        results: One for each case.
    """

    a: dict[str, Any]
    golden: str
    results: list[GoldenResult]

    @property
    def passed(self) -> bool:
        """Whether every case that was computed has the golden answer."""
        return all(one.parts_at is None for one in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        cases = [asdict(one) for one in self.results]
        return {"a": self.a, "golden": self.golden, "passed": self.passed, "cases": cases}


def check_golden(
    a: str | Path,
    golden: str | pathlib.Path,
    *,
    images: pathlib.Path | None = None,
    model: str | pathlib.Path | None = None,
    device: str = "auto",
    swap: Sequence[str] = (),
) -> GoldenComparison:
    """Answer the prompts of a golden file and compare the answers with it.

    Args:
        a: A path of ``ours`` or ``transformers``.
        golden: A golden file, or the name of a packaged one, such as ``"idefics2-8b"``.
        images: Folder of its pictures. If ``None``, the file's folder.
        model: A checkpoint as ``LLM`` takes it. If ``None``, the demo checkpoint.
        device: Where to compute, as ``LLM`` takes it.
        swap: Operations that are replaced by the reference's.

    Raises:
        Idefics2Error: The path, the file, the model or an option is invalid, a picture is missing,
            or no case can be computed.
    """
    path = Path.parse(a)
    if path.kind not in ("ours", "transformers"):
        raise ConfigError(f"a path must be ours or transformers to give answers, got {path}")
    file = GoldenFile.load(golden)
    name = printable_path(file.path)
    if file.model is not None and model is None:
        raise ConfigError(f"model must be {file.model} for {name}, got none")
    skipped = {case.name: _reason_to_skip(case, path) for case in file.cases}
    used = [case for case in file.cases if skipped[case.name] is None]
    if not used:
        raise ConfigError(f"{name}: must have a case for {path}, got {_reasons(skipped)}")
    inputs = [_input(case, file, images or file.path.parent) for case in used]
    folder = model_folder(model, None)
    with TemporaryDirectory(prefix="idefics2-parity-") as scratch:
        recording = record(
            path,
            pathlib.Path(scratch),
            inputs,
            folder,
            device=device,
            max_tokens=max(case.num_tokens for case in used),
            swap=swap,
            order=[stages.TOKENS],
        )
    processors = Processors(folder)
    tokenizer = processors.of(inputs[0]).tokenizer
    found = {
        case.name: _result(case, answer, tokenizer)
        for case, answer in zip(used, recording.cases, strict=True)
    }
    results = [
        found.get(case.name) or GoldenResult(case.name, skipped=skipped[case.name])
        for case in file.cases
    ]
    return GoldenComparison(recording.describe(), name, results)


def _reason_to_skip(case: GoldenCase, path: Path) -> str | None:
    own = _NF4 if path.nf4 else None
    if case.quantization == own:
        return None
    return f"its weights were {case.quantization or 'not quantized'}"


def _reasons(skipped: dict[str, str | None]) -> str:
    return ", ".join(f"{name}: {reason}" for name, reason in skipped.items())


def _input(case: GoldenCase, file: GoldenFile, folder: pathlib.Path) -> Case:
    """Return the input of ``case``; raise ``ConfigError`` if a picture is missing."""
    pictures = [folder / name for name in case.images]
    for name, picture in zip(case.images, pictures, strict=True):
        if not picture.is_file():
            home = f": it is published at {file.images[name]}" if name in file.images else ""
            raise ConfigError(f"{printable_path(picture)}: no such picture{home}")
    return Case(tuple(pictures), text=case.prompt, split=case.split, longest_edge=case.longest_edge)


def _result(case: GoldenCase, answer: CaseRecording, tokenizer: Tokenizer) -> GoldenResult:
    ids = answer.answer_ids[: case.num_tokens]
    text = tokenizer.decode(ids)
    if not case.token_ids:
        golden, at = _closest_text(case.texts, ids, tokenizer)
        return GoldenResult(case.name, text, at, (_token(ids, at, tokenizer), None), golden)
    golden = tokenizer.decode(case.token_ids)
    at = first_other(ids, case.token_ids)
    if at is None:
        return GoldenResult(case.name, text, golden_text=golden)
    tokens = _token(ids, at, tokenizer), _token(case.token_ids, at, tokenizer)
    logprob = case.logprobs[at] if case.logprobs else None
    return GoldenResult(case.name, text, at, tokens, golden, logprob)


def first_other(ids: Sequence[int], golden: Sequence[int]) -> int | None:
    """Return the index of the first token of ``golden`` that ``ids`` does not have, if any."""
    for index, token in enumerate(golden):
        if index >= len(ids) or ids[index] != token:
            return index
    return None


def _closest_text(
    texts: Sequence[str], ids: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, int | None]:
    """Return the text that ``ids`` follow longest, and the index of the first other token."""
    found = [(text, _first_outside(text.strip(), ids, tokenizer)) for text in texts]
    return max(found, key=lambda pair: len(ids) + 1 if pair[1] is None else pair[1])


def _first_outside(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    for count in range(1, len(ids) + 1):
        # A character may need several tokens
        start = tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}").strip()
        if not text.startswith(start):
            return count - 1
    return None if tokenizer.decode(ids).strip() == text else len(ids)


def _token(ids: Sequence[int], at: int | None, tokenizer: Tokenizer) -> str | None:
    if at is None or at >= len(ids):
        return None
    return tokenizer.decode([ids[at]], skip_special_tokens=False)
