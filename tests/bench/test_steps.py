"""``idefics2 bench steps``: the calls of a step and their costs, and the suite on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench_command import CPU, bench
from idefics2_bench.latency import OurSteps
from idefics2_bench.results.compare import compare
from idefics2_bench.results.results_file import read_results
from idefics2_bench.steps.model_steps import model_step
from idefics2_bench.steps.operation_calls import WatchedOps, call_of
from idefics2_bench.steps.parts import OUTSIDE, WHOLE
from idefics2_engine import LLM
from idefics2_engine.cli.main import main
from idefics2_engine.jobs.plan.latency_case import latency_case
from idefics2_kernels import REFERENCE
from idefics2_kernels.catalog import CATALOG, KernelSpec, gradient_of

pytestmark = pytest.mark.usefixtures("own_arguments")

# No step of the model calls these, nor gradients
_NOT_IN_STEPS = {"nf4_quantize", "nf4_dequantize", "apply_bitmask", "sample"}
_IN_STEPS = [spec for spec in CATALOG if spec.name not in _NOT_IN_STEPS and not gradient_of(spec)]


@pytest.mark.parametrize("spec", _IN_STEPS, ids=lambda spec: spec.name)
def test_cost_of_a_call_is_the_catalog_s(spec: KernelSpec) -> None:
    cases = [case for case in spec.cases if case.where == "any" and "shared" not in case.dims]
    assert cases
    for case in cases:
        call = call_of(spec.name, (), spec.make_inputs(case, torch.device("cpu")))
        assert call.cost == spec.cost(case), case.name


def test_step_makes_the_calls_of_the_engine_s_step(tiny: Path) -> None:
    watched = WatchedOps(REFERENCE)
    llm = LLM(tiny, device="cpu", split_images=False, ops=watched.ops)
    case = latency_case("decode-b3-s20")
    with torch.inference_mode():
        expected = watched.calls_of(model_step(case, llm.model))
        # The prompts are a step of as many calls
        both = watched.calls_of(OurSteps(case, llm, rounds=1).first)
    assert len(both) == 2 * len(expected)
    assert both[len(expected) :] == expected
    assert all(call.cost is not None for call in expected)


def test_suite(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["decode-b3-s20", "prefill-40", "image-56x84-b2"]
    options = ["steps", "--model", str(tiny), "--rounds", "2", "--report", str(tmp_path / "a.html")]
    options += [word for name in names for word in ("--case", name)]
    about, rows = bench(tmp_path / "steps.json", *options)
    assert about["copy_TBps"] > 0
    assert [row["case"] for row in rows if row["operation"] == WHOLE] == names
    for name in names:
        whole, *parts = [row for row in rows if row["case"] == name]
        assert sum(part["ms"] for part in parts) == pytest.approx(whole["traced_ms"])
        assert sum(part.get("floor_ms", 0) for part in parts) == pytest.approx(whole["floor_ms"])
        assert [part["operation"] for part in parts if "floor_ms" not in part] == [OUTSIDE]
    (attention,) = [
        row for row in rows if row["case"] == names[0] and "paged_attention" in row["operation"]
    ]
    # There are two layers
    assert attention["calls"] == 2
    (first,) = [row for row in rows if row["case"] == names[2] and row["operation"] == WHOLE]
    assert (first["images"], first["patches"], first["batch"]) == (2, 48, 2)
    printed = capsys.readouterr().out
    assert "decode-b3-s20, reference" in printed
    assert f"| {attention['operation']} | 2 |" in printed
    (file,) = read_results([tmp_path / "steps.json"])
    assert len(compare(file, file, 0.05).changes) == len(rows)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Steps by operation" in page
    assert "prefill-40 by operation" in page


def test_nf4_has_its_own_products(tiny: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny), "--quantization", "nf4", "--rounds", "1"]
    _, rows = bench(tmp_path / "steps.json", "steps", *options, "--case", "decode-b2-s20")
    assert {row["case"] for row in rows} == {"decode-b2-s20-nf4"}
    products = [row for row in rows if row["operation"].startswith("nf4_matmul")]
    assert products
    assert all(row["over_floor"] > 0 for row in products)


def test_step_that_is_not_finite_has_no_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return REFERENCE.linear(x, weight, bias) * float("nan")

    spoiled_ops = replace(REFERENCE, linear=spoiled)
    monkeypatch.setattr("idefics2_bench.steps.suite.REFERENCE", spoiled_ops)
    options = ["--model", str(tiny), "--case", "decode-b2-s20"]
    assert main(["bench", "steps", *CPU, *options]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "decode"], "case must be one like"),
        (["--case", "image-980-b1"], "the model's images have at most"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--device", "cuda", "--ops", "reference"], "--ops on a GPU must be triton"),
    ],
    ids=["case", "misfit", "rounds", "ops"],
)
def test_bad_options_are_refused(
    options: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "steps", "--model", str(tiny), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_kernels_of_a_graph_are_those_of_its_launches(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    names = ("decode-b2", "prefill-100", "image-112x84-b2")
    cases = [word for name in names for word in ("--case", name)]
    assert main(["bench", "steps", "--device", "cuda", *cases, "--json", str(out)]) == 0
    (file,) = read_results([out])
    for name in names:
        whole, *parts = [row for row in file.rows if row["case"] == name]
        assert whole["unmatched"] == 0
        assert all(part["launches"] >= part["calls"] for part in parts if "calls" in part)
        calls = sum(part.get("calls", 0) for part in parts)
        assert whole["launches"] >= calls > 0
