"""What the harnesses' versions of docs/evaluation.md call, and that our classes have it.

Without the harnesses the classes are read and not imported.
"""

import ast
import importlib
import inspect
import tomllib
from importlib.util import find_spec
from typing import Any

import pytest

from paths import ROOT

FOLDER = ROOT / "engine/idefics2_engine/evaluation"
# Names of the arguments of every public abstract method, by module and class
LMMS_EVAL = {
    "lmms_eval.api.model.lmms": {
        "generate_until": ["self", "requests"],
        "generate_until_multi_round": ["self", "requests"],
        "loglikelihood": ["self", "requests"],
    }
}
LM_EVAL = {
    "lm_eval.api.model.TemplateLM": {
        "eot_token_id": ["self"],
        "generate_until": ["self", "requests", "disable_tqdm"],
        "loglikelihood_rolling": ["self", "requests", "disable_tqdm"],
        "tok_encode": ["self", "string", "add_special_tokens", "kwargs"],
    }
}


def methods(file: str) -> dict[str, list[str]]:
    """Return the methods of the classes in a file, with the names of their arguments."""
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    return {
        method.name: [one.arg for one in method.args.args]
        for found in tree.body
        if isinstance(found, ast.ClassDef)
        for method in found.body
        if isinstance(method, ast.FunctionDef)
    }


@pytest.mark.parametrize(
    ("recorded", "file"),
    [(LMMS_EVAL, "lmms_eval_model.py"), (LM_EVAL, "lm_eval_model.py")],
    ids=["lmms_eval", "lm_eval"],
)
def test_classes_have_every_method_that_a_harness_calls(
    recorded: dict[str, dict[str, list[str]]], file: str
) -> None:
    own = methods(file)
    for wanted in recorded.values():
        for name, arguments in wanted.items():
            given = [argument for argument in arguments if argument != "kwargs"]
            assert own[name][: len(given)] == given


# What the harnesses and their packages do to themselves
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("recorded", [LMMS_EVAL, LM_EVAL], ids=["lmms_eval", "lm_eval"])
def test_the_record_is_that_of_the_installed_version(
    recorded: dict[str, dict[str, list[str]]],
) -> None:
    for path, wanted in recorded.items():
        module, _, name = path.rpartition(".")
        if find_spec(module.partition(".")[0]) is None:
            pytest.skip("the harness is not installed")
        found: Any = getattr(importlib.import_module(module), name)
        abstract = {
            method: inspect.getattr_static(found, method)
            for method in found.__abstractmethods__
            if not method.startswith("_")
        }
        assert {
            method: [*inspect.signature(getattr(value, "fget", value)).parameters]
            for method, value in abstract.items()
        } == wanted


def test_entry_point_names_the_classes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (name, target), *others = project["entry-points"]["lmms_eval.models"].items()
    assert (name, others) == ("idefics2_engine", [])
    module, _, manifest = target.partition(":")
    assert module == "idefics2_engine.evaluation.lmms_eval_manifest"
    text = (FOLDER / "lmms_eval_manifest.py").read_text(encoding="utf-8")
    assert f"{manifest} = ModelManifest(" in text
    tree = ast.parse((FOLDER / "lmms_eval_model.py").read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for kind in ("Chat", "Simple"):
        assert f"{{_MODULE}}.Idefics2Engine{kind}" in text
        assert f"Idefics2Engine{kind}" in classes
