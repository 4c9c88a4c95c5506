"""``idefics2 bench hf`` on a tiny checkpoint, and what it shares and counts."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from bench_command import bench
from idefics2_bench import report, transformers_peer
from idefics2_bench.hf import nf4
from idefics2_bench.hf.cases import CASES, Sizes, Texts
from idefics2_bench.hf.generating import timed_answers
from idefics2_bench.hf.memory import memory_figures
from idefics2_bench.hf.models import Models
from idefics2_bench.latency_peers import COMPILED_PEER
from idefics2_bench.workloads import Counts
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.cli.main import main

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_arguments")

SMALL = ["--shrink", "16", "--rounds", "1"]


@pytest.fixture
def models(tiny: Path) -> Models:
    return Models.on(load_checkpoint(tiny), tiny)


@pytest.mark.long
def test_every_case_runs_on_a_cpu(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    about, rows = bench(out, "hf", "--model", str(tiny), *SMALL)
    assert about["commit"] == "abc"
    forwards = ("prefill-4096", "images-mixed-16", "images-980-b8")
    answers = ("engine", "loop", "transformers", "llm")
    wanted = [(case, impl) for case in forwards for impl in ("reference", "transformers")]
    wanted += [("generate-64x128", impl) for impl in answers]
    if find_spec("bitsandbytes"):
        wanted += [("nf4-decode", impl) for impl in ("engine", "transformers")]
    assert [(row["case"], row["impl"]) for row in rows] == [
        (f"{case}-shrink16", impl) for case, impl in wanted
    ]
    peers = {row["case"]: row["ms"] for row in rows if row["impl"] == "transformers"}
    for row in rows:
        assert (row["kernel"], row["dtype"]) == ("hf", "float32")
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        if row["impl"] in ("reference", "engine", "loop"):
            assert (row["peer"], row["peer_ms"]) == ("transformers", peers[row["case"]])
            assert row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"])
        # The same weights, and greedy answers
        assert row.get("peer_difference", 0) < 1e-4
        assert row.get("same_tokens", 1) == 1
    prefill, _, mixed = rows[:3]
    assert (prefill["text_tokens"], mixed["images"]) == (256, 2)
    engine, loop, theirs, llm = rows[6:10]
    assert (engine["text_tokens"], engine["new_tokens"]) == (32, 32)
    assert engine["new_tokens_per_s"] == pytest.approx(32e3 / engine["ms"])
    for row in (engine, loop):
        shares = {other["impl"]: row["ms"] / other["ms"] for other in (theirs, llm)}
        assert row["share_of"] == pytest.approx(shares)
    shown = capsys.readouterr()
    assert "memory-generate: only a GPU's allocations are counted: left out" in shown.err
    assert main(["bench", "report", str(out), "-o", str(tmp_path / "page.html")]) == 0


def test_both_classes_and_the_engine_have_one_memory(models: Models) -> None:
    from idefics2_engine.hf.shared_weights import config_of

    engine = models.own.engine.share_weights(models.own, config_of(models.own), models.packed.ops)
    own, peer = (dict(model.named_parameters()) for model in (models.own, models.peer))
    assert own.keys() == peer.keys()
    assert all(own[name].data_ptr() == peer[name].data_ptr() for name in own)
    packed = dict(models.packed.named_parameters())
    for name, parameter in engine.named_parameters():
        assert parameter.data_ptr() == packed[name].data_ptr()
    assert models.own.config._attn_implementation == "idefics2"
    assert models.peer.config._attn_implementation == "sdpa"


def test_memory_beside_weights_and_kv_cache(models: Models) -> None:
    texts = Texts(count=3, length=5, new_tokens=5)
    weights = models.packed.num_bytes
    # Keys and values of 30 tokens
    text = models.packed.config.text
    cache = 30 * text.kv_values * models.packed.dtype.itemsize
    row = memory_figures("loop", models, texts, weights + 500, weights + cache + 2000)
    assert row["beside_GB"] == pytest.approx(2e-6)
    assert row["before_GB"] == pytest.approx(5e-7)
    assert row["kv_cache_GB"] == pytest.approx(cache / 1e9)
    head = {"kernel": "hf", "case": "memory-generate", "impl": "loop", "model": "m", "dtype": "d"}
    assert "0.00 GB beside weights and KV cache" in report.whole_line({**head, **row})
    about = {"gpu": "g", "torch": "t", "triton": "t", "commit": "c", "date": "d"}
    assert "| 0.00 GB beside weights and KV cache |" in report.whole_table(about, [{**head, **row}])


def test_a_compiled_peer_that_fails_has_an_error(models: Models) -> None:
    ids = models.prompts(Texts(2, 3, 1))

    def broken() -> None:
        raise RuntimeError("no compiler\nhere")

    answers = {"engine": lambda: ids, "transformers": lambda: ids, COMPILED_PEER: broken}
    engine, _, compiled = timed_answers(answers, Counts(new_tokens=6), models.device, 1)  # type: ignore[arg-type]
    assert compiled["error"] == "RuntimeError: no compiler here"
    assert "ms" not in compiled
    assert engine["peer"] == "transformers"
    with pytest.raises(RuntimeError, match="no compiler"):
        timed_answers({"transformers": broken}, Counts(), models.device, 1)  # type: ignore[dict-item]


def test_without_bitsandbytes_its_case_is_left_out(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(nf4, "find_spec", lambda _: None)
    case = ["--case", "prefill-4096", "--case", "nf4-decode", *SMALL]
    _, rows = bench(tmp_path / "out.json", "hf", "--model", str(tiny), *case)
    assert {row["case"] for row in rows} == {"prefill-4096-shrink16"}
    assert "nf4-decode: bitsandbytes is not installed: left out" in capsys.readouterr().err


def test_whole_cases_have_the_sizes_of_their_names() -> None:
    sizes = Sizes()
    assert sizes.prefill == Texts(1, 4096, 1)
    assert sizes.generate == Texts(64, 128, 128)
    assert sizes.images("images-980-b8", 14) == [(980, 980)] * 8
    mixed = sizes.images("images-mixed-16", 14)
    assert len(mixed) == 16
    assert all(side % 14 == 0 for size in mixed for side in size)
    assert [sizes.name(case) for case in CASES] == list(CASES)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--shrink", "0"], "--shrink must be at least 1, got 0"),
        (["--quantization", "nf4"], "--quantization: case nf4-decode quantizes"),
        (["--peer-compile"], "--peer-compile: transformers compiles on a GPU only"),
        (["--case", "decode"], "invalid choice: 'decode'"),
    ],
    ids=["rounds", "shrink", "quantization", "compile", "case"],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "hf", "--device", "cpu", *options]) == 2
    assert wanted in capsys.readouterr().err


def test_transformers_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_peer, "is_installed", lambda: False)
    assert main(["bench", "hf", "--device", "cpu"]) == 2
    assert "transformers must be installed" in capsys.readouterr().err
