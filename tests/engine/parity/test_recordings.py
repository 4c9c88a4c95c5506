"""Recordings on disk, digests, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from idefics2_engine.demo import DEMO_IMAGES
from idefics2_engine.errors import ConfigError
from idefics2_engine.parity import Case
from idefics2_engine.parity.recording.digest import SAMPLES, Digest
from idefics2_engine.parity.recording.dump import Part, Recording
from parity_recordings import CASES, TOKENS, compare_on_cpu, first_stage, record_path


def full(part: Part) -> Tensor:
    assert isinstance(part, Tensor)
    return part


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_recording_has_every_stage_of_every_case(ours: Path) -> None:
    recording = Recording.load(ours)
    (with_image, text_only) = recording.cases
    model_stages = [stage for stage in recording.order if stage != "text"]
    assert set(recording.hashes[0]) == set(model_stages)
    assert len(recording.parts(0, "tiles")) == 5
    assert recording.parts(1, "tiles") == []
    for case, number in ((with_image, 0), (text_only, 1)):
        prompt, answer = map(full, recording.parts(number, "logits"))
        assert prompt.shape == (len(case.prompt_ids), 960)
        assert answer.shape == (len(case.answer_ids) - 1, 960)
        best = [int(prompt[-1].argmax()), *answer.argmax(-1).tolist()]
        assert best == case.answer_ids
    assert with_image.place("vision layer 0", 1, 9) == {
        "image": 0,
        "part": "top right",
        "patch": [1, 1],
    }
    length = len(text_only.prompt_ids)
    assert text_only.place("text norm", 1, 0)["token"] == length


def test_digest_is_small_and_finds_differences(ours: Path, theirs: Path, tmp_path: Path) -> None:
    record_path("ours:reference", tmp_path / "small", digest=True)
    assert num_bytes(tmp_path / "small") < num_bytes(ours) / 20
    assert compare_on_cpu(tmp_path / "small", ours).same_bits
    judged = compare_on_cpu(tmp_path / "small", theirs)
    assert judged.within_rounding
    assert not judged.same_bits
    assert judged.logits is None


def test_digest_of_a_wrong_path_is_named(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idefics2_engine.model import text

    table = text.rotary_table
    with monkeypatch.context() as patch:
        patch.setattr(text, "rotary_table", lambda config: table(config).bfloat16().float())
        record_path("ours:reference", tmp_path / "a", digest=True)
    assert first_stage(compare_on_cpu(tmp_path / "a", theirs)) == "text layer 0"


def test_saved_path_is_compared_and_kept(ours: Path, tmp_path: Path) -> None:
    for name, digest in (("full", False), ("small", True)):
        comparison = compare_on_cpu(
            "ours:reference", ours, save=tmp_path / name, digest=digest, float64=False
        )
        assert comparison.same_bits
        assert Recording.load(tmp_path / name).is_digest is digest
        assert compare_on_cpu(tmp_path / name, ours, float64=False).same_bits


def test_digest_of_a_part() -> None:
    part = torch.arange(1000, dtype=torch.float32).reshape(50, 20)
    digest = Digest.of(part)
    assert torch.allclose(digest.norms, part.double().norm(dim=-1), rtol=1e-14)
    assert len(digest.samples) == SAMPLES
    assert set(digest.samples.tolist()) <= set(part.flatten().tolist())
    assert torch.equal(Digest.of(part + 1).samples, digest.samples + 1)
    assert digest.sha256 != Digest.of(part.double()).sha256
    assert [tuple(view.shape) for view in digest.rows(50)] == [(50, 1), (1, SAMPLES)]
    assert [tuple(view.shape) for view in digest.rows(49)] == [(49, 1), (1, 0)]


def test_existing_files_are_not_overwritten(ours: Path) -> None:
    with pytest.raises(ConfigError, match="must be a new folder or an empty one"):
        record_path("ours:reference", ours)


def test_other_inputs_are_refused(ours: Path) -> None:
    with pytest.raises(ConfigError, match="wanted 2 cases, got 1"):
        compare_on_cpu(ours, ours, cases=CASES[:1])
    with pytest.raises(ConfigError, match="same inputs, got 2 and 1"):
        compare_on_cpu(ours, "ours:reference", cases=CASES[:1], float64=False)
    for other, stage in (
        (Case.question("Where is the star?", [DEMO_IMAGES / "crowd.png"]), "decode"),
        (Case.question("Where is the heart?", CASES[0].images), "token ids"),
    ):
        with pytest.raises(ConfigError, match=f"case 0: the inputs must be .* another {stage}"):
            compare_on_cpu(ours, ours, cases=[other, CASES[1]])


def test_broken_recordings_are_refused(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "recording.json").write_text('{"format": 0}')
    with pytest.raises(ConfigError, match="format must be 1, got 0"):
        compare_on_cpu(tmp_path, ours)
    text = (ours / "recording.json").read_text(encoding="utf-8")
    (tmp_path / "recording.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"case-0000\.safetensors: cannot be read"):
        compare_on_cpu(tmp_path, ours, float64=False)
    (tmp_path / "recording.json").write_text('{"format": 1, "cases": [{"a": 1}]}')
    with pytest.raises(ConfigError, match="is no recording of parity"):
        compare_on_cpu(tmp_path, ours)


def test_answers_have_the_tokens_that_were_asked_for(ours: Path) -> None:
    assert [len(case.answer_ids) for case in Recording.load(ours).cases] == [TOKENS, TOKENS]
