"""Checks of caches: where they are, what the hub's has, and the disk below them."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fake_machine import VERSIONS, make_machine, with_environ
from hub_cache import write_snapshot
from idefics2_engine.checkpoint.shards import INDEX, SINGLE
from idefics2_engine.doctor.cache_checks import (
    HUB_MODEL,
    cached_models,
    find_cached,
    hub_check,
    hub_folder,
    triton_cache_check,
    triton_folder,
)
from idefics2_engine.doctor.check import Status
from idefics2_engine.doctor.machine import Machine

Usage = namedtuple("Usage", "total used free")
CONFIG = b'{"model_type": "idefics2"}'
WHOLE = {"config.json": CONFIG, SINGLE: b"weights"}
SHARDED = {
    "config.json": CONFIG,
    INDEX: json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode(),
    "one.safetensors": b"",
}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the free bytes of every disk, which a test may change."""
    free = {"free": 10**12}
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**12, 0, free["free"]))
    return free


def test_hub_with_idefics2_is_ok(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path)
    write_snapshot(hub_folder(machine), HUB_MODEL, WHOLE)
    write_snapshot(hub_folder(machine), "org/other", {"config.json": b'{"model_type": "llama"}'})
    write_snapshot(hub_folder(machine), "org/broken", {"config.json": b"["})
    check = hub_check(machine)
    assert check.status is Status.OK
    assert check.found.endswith(f"has {HUB_MODEL}")
    assert (check.fix, check.details["models"]) == ("", [HUB_MODEL])


def test_hub_without_idefics2_says_how_to_get_it(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path)
    check = hub_check(machine)
    assert check.status is Status.OK
    assert "no Idefics2 in it" in check.found
    assert "33.6 GB" in check.found
    assert check.fix.startswith(f"hf download {HUB_MODEL}")
    offline = hub_check(with_environ(machine, HF_HUB_OFFLINE="1"))
    assert offline.fix.startswith("HF_HUB_OFFLINE=0 hf download")


def test_hub_without_its_client_is_installed_first(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path, versions={**VERSIONS, "huggingface_hub": None})
    wanted = "install the extra 'hub' (in the checkout: pip install '.[hub]'), then hf download"
    assert hub_check(machine).fix.startswith(wanted)


def test_hub_with_an_incomplete_model_is_a_warning(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path)
    write_snapshot(hub_folder(machine), "org/part", SHARDED)
    check = hub_check(machine)
    assert check.status is Status.WARNING
    assert "org/part is not whole" in check.found
    assert "two.safetensors" in check.found
    assert str(tmp_path) not in check.found.split("; ", 1)[1]
    assert check.fix.startswith("hf download org/part")
    assert check.details["incomplete"] == ["org/part"]


def test_hub_without_room_is_a_warning(tmp_path: Path, disk: dict[str, int]) -> None:
    disk["free"] = 33 * 10**9
    check = hub_check(make_machine(tmp_path))
    assert check.status is Status.WARNING
    assert check.fix == "set HF_HOME to a folder on a larger disk"


def test_caches_that_cannot_be_written(
    tmp_path: Path, disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The user of the tests may be root, who may write everywhere
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    machine = make_machine(tmp_path)
    assert hub_check(machine).status is Status.WARNING
    assert "HF_HOME" in hub_check(machine).fix
    check = triton_cache_check(machine)
    assert check.status is Status.PROBLEM
    assert "TRITON_CACHE_DIR" in check.fix


def test_triton_cache(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path)
    (triton_folder(machine) / "entry").mkdir(parents=True)
    check = triton_cache_check(machine)
    assert (check.status, check.details["entries"]) == (Status.OK, 1)
    disk["free"] = 10**8
    assert triton_cache_check(machine).status is Status.WARNING


HUB_ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"HF_HOME": "/one"},
    {"HF_HUB_CACHE": "/two", "HF_HOME": "/one"},
    {"HUGGINGFACE_HUB_CACHE": "/three"},
    {"XDG_CACHE_HOME": "/four"},
    {"HF_HOME": "~/five"},
    {"HF_HOME": "$XDG_CACHE_HOME/six", "XDG_CACHE_HOME": "/seven"},
]


def test_hub_folder_is_that_of_the_client(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    machine = make_machine(tmp_path)
    program = (
        "from importlib import reload\n"
        "from huggingface_hub import constants\n"
        "show = lambda: reload(constants).HF_HUB_CACHE\n"
    )
    ours = [str(hub_folder(with_environ(machine, **more))) for more in HUB_ENVIRONMENTS]
    assert ours == shown_in(machine, program, HUB_ENVIRONMENTS)


def test_triton_folder_is_that_of_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    machine = make_machine(tmp_path)
    environments = [
        {},
        {"TRITON_HOME": "/one"},
        {"TRITON_HOME": "/one", "TRITON_CACHE_DIR": "/two"},
    ]
    program = "from triton import knobs\nshow = lambda: knobs.cache.dir\n"
    ours = [str(triton_folder(with_environ(machine, **more))) for more in environments]
    assert ours == shown_in(machine, program, environments)


def shown_in(machine: Machine, program: str, environments: list[dict[str, str]]) -> list[str]:
    """Return what ``show``, defined by ``program``, returns in each of the environments."""
    program += (
        "import json, os, sys\n"
        "base = dict(os.environ)\n"
        "for more in json.loads(sys.argv[1]):\n"
        "    os.environ.clear()\n"
        "    os.environ.update(base | more)\n"
        "    print(show())\n"
    )
    command = [sys.executable, "-c", program, json.dumps(environments)]
    environ = dict(machine.environ)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_cached_models_are_found_by_name(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    folder = write_snapshot(hub_folder(machine), "org/one", WHOLE)
    assert find_cached(machine, "org/one") == folder
    assert find_cached(machine, "org/two") is None
    assert cached_models(tmp_path / "none") == []


def test_details_have_folder_and_disk(tmp_path: Path, disk: dict[str, int]) -> None:
    machine = make_machine(tmp_path)
    for check, folder in ((hub_check, hub_folder), (triton_cache_check, triton_folder)):
        details = check(machine).details
        assert details["folder"] == str(folder(machine))
        assert details["free_bytes"] == 10**12
