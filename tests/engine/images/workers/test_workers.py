"""Worker processes give what threads give, and whatever ends them costs one image at most."""

import base64
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import ImageError, ImageWarning
from idefics2_engine.images import reader as reader_module
from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import FileTiles, TileRules, file_tiles
from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.reader import ImageReader
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.images.workers.worker_pool import WorkerPool, default_workers
from pictures import (
    FORMATS,
    file,
    frames,
    noise,
    oriented,
    sixteen_bits,
    sixteen_bits_rgb,
    transparent_palette,
)

LONGEST, SHORTEST, PATCH = 70, 28, 14
IMAGE_BYTES = 5 * LONGEST * LONGEST * 3 + 5 * 64
# Nothing here takes that long; a test that would wait for ever fails after it
SECONDS = 60.0


def rules(
    policy: ImagePolicy = ImagePolicy.PARITY, split: bool = False, max_pixels: int = 10**6
) -> TileRules:
    half = (0.5, 0.5, 0.5)
    config = ImageConfig(LONGEST, SHORTEST, split, 2, 1 / 255, half, half)
    return TileRules(policy, max_pixels, config, PATCH, 70)


def started(count: int = 1, **options: Any) -> WorkerPool:
    made = WorkerPool(count, IMAGE_BYTES, **{"pool_bytes": 1 << 22} | options)
    made.start()
    assert made.wait(SECONDS)
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Return whether there is such a process; a zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_equal(got: list[Tile], wanted: list[Tile]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.fingerprint == other.fingerprint
        assert one.grid == other.grid
        assert one.fingerprint == Tile(one.pixels, PATCH, 70).fingerprint
        assert one.pixels.flags.c_contiguous
        assert not one.pixels.flags.writeable


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    made = started(2)
    yield made
    made.close()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


DAMAGED = file(noise(90, 80), "PNG")[:-300]
FILES: dict[str, bytes] = {
    **{kind: file(noise(91, 64), kind) for kind in FORMATS},
    "large": file(noise(300, 117), "JPEG"),
    "one pixel": file(noise(1, 1), "PNG"),
    "a line": file(noise(1, 200), "PNG"),
    "gray": file(noise(50, 40, "L"), "PNG"),
    "alpha": file(noise(50, 40, "RGBA"), "PNG"),
    "CMYK": file(noise(50, 40, "CMYK"), "JPEG"),
    "turned": oriented(noise(60, 40), "JPEG", 6),
    "frames": frames("GIF"),
    "palette": transparent_palette(),
    "16 bits": sixteen_bits(),
    "16 bits RGB": sixteen_bits_rgb(),
    "damaged": DAMAGED,
    "too large": file(noise(1001, 1000, "1"), "PNG"),
    "no image": b"no image",
    "nothing": b"",
}


def outcome(read: Callable[[], list[Tile]]) -> tuple[list[Tile], str | None, list[str]]:
    """Return the tiles, the error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tiles, error = read(), None
        except ImageError as raised:
            tiles, error = [], f"{type(raised).__name__}: {raised}"
    return tiles, error, [str(one.message) for one in caught]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("policy", ImagePolicy)
@pytest.mark.parametrize("name", FILES)
def test_a_worker_gives_what_a_thread_gives(
    pool: WorkerPool, name: str, policy: ImagePolicy, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = MediaConfig(image_policy=policy, max_image_pixels=10**6)
    of = rules(policy, split)
    threads, workers = (ImageReader(media, of, FileCache(), own) for own in (None, pool))
    wanted, wanted_error, wanted_warnings = outcome(lambda: threads.tiles(FILES[name]))
    # Whatever is decoded from here on is decoded in a worker
    monkeypatch.setattr(reader_module, "file_tiles", None)
    got, error, warned = outcome(lambda: workers.tiles(FILES[name], in_worker=True))
    assert (error, warned) == (wanted_error, wanted_warnings)
    assert_equal(got, wanted)
    assert (error is None) == bool(got)
    if error is None:
        with warnings.catch_warnings(action="ignore"):
            infos = [workers.read(FILES[name]).info, threads.read(FILES[name]).info]
        assert infos[0] == infos[1]


SOURCES: dict[str, Callable[[Path, bytes], Any]] = {
    "path": lambda path, data: path,
    "str": lambda path, data: str(path),
    "file URL": lambda path, data: f"file://{path}",
    "bytes": lambda path, data: data,
    "bytearray": lambda path, data: bytearray(data),
    "data URI": lambda path, data: data_uri(data),
    "a dict": lambda path, data: {"bytes": data, "path": None},
    "a dict with a path": lambda path, data: {"bytes": None, "path": str(path)},
    "an open file": lambda path, data: path.open("rb"),
    "Pillow": lambda path, data: Image.open(path),
    "array": lambda path, data: np.array(Image.open(path)),
    "tensor": lambda path, data: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
    "missing": lambda path, data: path.with_name("b.png"),
    "outside": lambda path, data: "/etc/passwd",
    "URL": lambda path, data: "https://pictures.example/a.png",
    "a number": lambda path, data: 7,
}
OBJECTS = ("Pillow", "array", "tensor")


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_read_by_the_rules(
    pool: WorkerPool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = file(noise(80, 61), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    media = MediaConfig(allowed_media_root=tmp_path)
    threads, workers = (ImageReader(media, rules(), FileCache(), own) for own in (None, pool))
    outcomes = []
    for one in (threads, workers):
        source = SOURCES[kind](path, data)
        outcomes.append(outcome(lambda: one.tiles(source, in_worker=True)))  # noqa: B023
        if hasattr(source, "close"):
            source.close()
        monkeypatch.setattr(reader_module, "file_tiles", None)
    (wanted, *others), (got, *same) = outcomes
    assert same == others
    assert_equal(got, wanted)
    assert threads.files.decoded == workers.files.decoded == (bool(got) and kind not in OBJECTS)


def test_pillow_s_switches_reach_the_worker(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match="damaged or cut off"):
        pool.tiles(DAMAGED, "a", rules())
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    got = pool.tiles(DAMAGED, "a", rules())
    assert got is not None
    assert_equal(list(got.tiles), list(file_tiles(DAMAGED, "a", rules()).tiles))
    monkeypatch.undo()
    with pytest.raises(ImageError, match="damaged or cut off"):
        pool.tiles(DAMAGED, "a", rules())


def test_a_worker_loads_no_torch_and_opens_no_network_library(pool: WorkerPool) -> None:
    for pid in pool.pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "PIL" in maps
        assert "torch" not in maps
        assert "_ssl" not in maps


def test_an_interrupt_does_not_reach_workers(pool: WorkerPool) -> None:
    pids = pool.pids
    for pid in pids:
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
    for _ in pids:
        assert pool.tiles(FILES["PNG"], "a", rules())
    assert pool.pids == pids


# Workers that are killed


@pytest.mark.filterwarnings("error")
def test_a_killed_worker_costs_one_image_and_is_replaced() -> None:
    pool = started()
    try:
        free = pool.num_free_bytes
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as threads:
            lost = threads.submit(pool.tiles, FILES["PNG"], "a.png", rules())
            wait_for(lambda: pool.num_free_bytes < free)
            other = threads.submit(pool.tiles, FILES["JPEG"], "b.jpg", rules())
            os.kill(pid, signal.SIGKILL)
            message = r"^a\.png: could not be decoded: .* ended with signal 9$"
            with pytest.raises(ImageError, match=message):
                lost.result(SECONDS)
            # The one that waited for a worker gets the next
            got = other.result(SECONDS)
        assert got is not None
        assert_equal(list(got.tiles), list(file_tiles(FILES["JPEG"], "b", rules()).tiles))
        assert pool.pids != [pid]
        assert not is_running(pid)
        del got, other
        assert pool.num_free_bytes == free
    finally:
        pool.close()


def test_a_worker_that_cannot_start_leaves_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = WorkerPool(2, IMAGE_BYTES)
    pool.start()
    pool.wait(SECONDS)
    assert not pool.is_running
    assert pool.tiles(FILES["PNG"], "a", rules()) is None
    reader = ImageReader(MediaConfig(), rules(), FileCache(), pool)
    assert reader.tiles(FILES["PNG"], in_worker=True)
    pool.close()


def test_nothing_is_left_after_close() -> None:
    pool = started(2)
    pids = pool.pids
    got = pool.tiles(FILES["PNG"], "a", rules())
    assert got is not None
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    free = pool.num_free_bytes
    descriptors = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(pool.tiles, FILES["PNG"], "a", rules()) for _ in range(3)]
        wait_for(lambda: pool.num_free_bytes < free - 2 * IMAGE_BYTES)
        pool.close()
        # Two waited for a worker's reply, one for a worker
        ends = []
        for one in waiting:
            with suppress(ImageError):
                ends.append(one.result(SECONDS))
    assert ends == [None]
    pool.close()
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        assert not is_running(pid)
    # The sockets and the shared memory
    assert len(os.listdir("/proc/self/fd")) == descriptors - len(pids) - 1
    assert pool.tiles(FILES["PNG"], "a", rules()) is None
    assert_equal(list(got.tiles), list(file_tiles(FILES["PNG"], "a", rules()).tiles))


# No guard of the main module: workers must not run it again
SCRIPT = """
import sys, time
from idefics2_engine.images.workers.worker_pool import WorkerPool
pool = WorkerPool(2, 1 << 16)
pool.start()
assert pool.wait(60)
while len(pool.pids) < 2: time.sleep(0.01)
print(*pool.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_workers_end_with_the_process(end: str) -> None:
    command = [sys.executable, "-c", SCRIPT]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_running, pids))
        if end == "kill":
            parent.kill()
        else:
            parent.communicate()
    wait_for(lambda: not any(map(is_running, pids)))


# Shared memory


def test_a_full_pool_makes_nobody_wait() -> None:
    # Room for two images while they are made
    pool = started(pool_bytes=2 * IMAGE_BYTES)
    try:
        free = pool.num_free_bytes
        wanted = list(file_tiles(FILES["large"], "a", rules(split=True)).tiles)
        held = [pool.tiles(FILES["large"], "a", rules(split=True)) for _ in range(20)]
        assert pool.num_free_bytes < IMAGE_BYTES
        for got in held:
            assert got is not None
            assert_equal(list(got.tiles), wanted)
        # A view of the pixels is enough to hold their block
        used = [pool.num_free_bytes]
        assert held[0] is not None
        view = held[0].tiles[1].patch_pixels()[1:]
        held.clear()
        del got
        used.append(pool.num_free_bytes)
        assert used[0] < used[1] < free
        np.testing.assert_array_equal(view, wanted[1].pixels[1:])
        del view
        assert pool.num_free_bytes == free
    finally:
        pool.close()


def test_blocks_are_written_again_only_when_their_tiles_are_gone() -> None:
    pool = started(2, pool_bytes=4 * IMAGE_BYTES)
    names = list(FORMATS)
    wanted = {name: list(file_tiles(FILES[name], "a", rules()).tiles) for name in names}
    try:
        rng = np.random.default_rng(0)
        held: list[tuple[str, FileTiles]] = []
        with ThreadPoolExecutor(3) as threads:
            for _ in range(12):
                drawn = [names[at] for at in rng.integers(0, len(names), 6)]
                made = threads.map(lambda name: pool.tiles(FILES[name], "a", rules()), drawn)
                held += [(n, got) for n, got in zip(drawn, made, strict=True) if got is not None]
                for name, got in held:
                    assert_equal(list(got.tiles), wanted[name])
                held = [one for one in held if rng.random() < 0.5]
    finally:
        pool.close()


def test_memory_is_pinned_in_parts_and_released() -> None:
    pinned: list[tuple[int, int]] = []

    def pin(address: int, size: int) -> Callable[[], None] | None:
        if len(pinned) == 3:
            return None
        assert address % 4096 == 0
        pinned.append((address, size))
        return lambda: pinned.remove((address, size))

    size = (5 << 26) + (1 << 20)
    pool = started(pool_bytes=size, pin=pin)
    # A page of each of the six parts is left free
    wait_for(lambda: pool.num_free_bytes == size - 6 * 4096)
    assert len(pinned) == 3
    assert pool.tiles(FILES["PNG"], "a", rules())
    pool.close()
    assert not pinned


def test_blocks_lie_within_a_pinned_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from two pinned ranges is an error of CUDA."""
    monkeypatch.setattr("idefics2_engine.images.workers.worker_pool._PIN_BYTES", 1 << 18)
    parts: list[tuple[int, int]] = []

    def pin(address: int, size: int) -> Callable[[], None]:
        parts.append((address, address + size))
        return lambda: None

    pool = started(pool_bytes=1 << 22, pin=pin)
    try:
        wait_for(lambda: len(parts) == 16 and pool.num_free_bytes > 4_000_000)
        held = [pool.tiles(FILES["large"], "a", rules()) for _ in range(100)]
        pixels = [tile.pixels for got in held if got is not None for tile in got.tiles]
        begins = np.array([one.ctypes.data for one in pixels])
        ends = begins + [one.nbytes for one in pixels]
        first, last = parts[0][0], parts[-1][1]
        inside = (begins >= first) & (ends <= last)
        assert inside.sum() > 16
        owners = (begins[inside] - first) >> 18
        np.testing.assert_array_equal((ends[inside] - 1 - first) >> 18, owners)
    finally:
        pool.close()


# The model


def rows(count: int) -> list[Any]:
    return [
        {
            "prompt": "<image>the chicken" + " sits" * (i % 3),
            "multi_modal_data": {"image": file(noise(40 + i, 60), "PNG")},
        }
        for i in range(count)
    ]


def test_a_job_of_many_images_is_answered_alike_and_a_killed_worker_costs_one_row(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MANY_IMAGES", 6)
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    many = rows(12)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 200}
    with LLM(checkpoint, **options) as llm:
        assert llm.images.workers is None
        wanted = [output.outputs[0].token_ids for output in llm.generate(many, greedy)]
        assert llm.images.files.decoded == len(many)
    with LLM(checkpoint, **options, image_workers=1, max_num_seqs=2) as llm:
        workers = llm.images.workers
        assert workers is not None
        llm.generate(many[:3], greedy)
        assert list(llm.iterate(many[:3], greedy))
        # Too few
        assert workers.pids == []

        def source() -> Iterator[Any]:
            yield from many[:-2]
            assert workers.wait(SECONDS)
            yield from many[-2:]
            wait_for(lambda: llm.images.files.decoded == len(many))
            (pid,) = workers.pids
            os.kill(pid, signal.SIGSTOP)
            free = workers.num_free_bytes
            yield {"prompt": "<image>", "multi_modal_data": {"image": FILES["large"]}}
            wait_for(lambda: workers.num_free_bytes < free)
            os.kill(pid, signal.SIGKILL)
            yield {"prompt": "<image>", "multi_modal_data": {"image": FILES["JPEG"]}}
            yield from many[:2]

        got = {int(output.request_id): output for output in llm.iterate(source(), greedy)}
        answers = [got[at].outputs[0].token_ids for at in range(len(many))]
        assert answers == wanted
        assert isinstance(got[len(many)].error, ImageError)
        assert [at for at, output in got.items() if output.error] == [len(many)]
        assert len(got) == len(many) + 4
        # A generator that is left, and then another call
        outputs = llm.iterate(rows(20), greedy)
        next(outputs)
        outputs.close()
        assert llm.generate(many[:1], greedy)[0].outputs[0].token_ids == wanted[0]
        pids = workers.pids
    assert not any(map(is_running, pids))


JOB = """
import sys
from idefics2_engine import LLM, SamplingParams
from pictures import file, noise
llm = LLM(device="cpu", image_workers=1)
images = [file(noise(200 + n, 160), "PNG") for n in range(400)]
rows = [{"prompt": "<image>a", "multi_modal_data": {"image": image}} for image in images]
try:
    for number, _ in enumerate(llm.iterate(rows, SamplingParams(max_tokens=2))):
        if number == 60:
            assert llm.images.workers.wait(60)
            print(*llm.images.workers.pids, flush=True)
except KeyboardInterrupt:
    print(*llm.images.workers.pids, llm.generate(rows[0])[0].error, flush=True)
"""


@pytest.mark.long
def test_an_interrupt_of_a_job_leaves_model_and_workers() -> None:
    helpers = os.pathsep.join(
        [str(Path(__file__).parents[3] / "helpers"), os.environ["PYTHONPATH"]]
    )
    with subprocess.Popen(
        [sys.executable, "-c", JOB],
        env=os.environ | {"PYTHONPATH": helpers},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        (pid,) = job.stdout.readline().split()
        os.killpg(job.pid, signal.SIGINT)
        assert job.communicate()[0].split() == [pid, "None"]
    assert job.returncode == 0
    assert not is_running(int(pid))


def test_workers_end_with_a_model_that_is_collected(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cpu", dtype="float32", image_workers=1)
    workers = llm.images.workers
    assert workers is not None
    workers.start()
    assert workers.wait(SECONDS)
    (pid,) = workers.pids
    del llm
    gc.collect()
    wait_for(lambda: not is_running(pid))


def test_the_number_of_workers_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, wanted in ((1, 1), (2, 1), (5, 4), (16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, n=usable: set(range(n)))
        assert default_workers() == wanted


# Files that were seen


def test_a_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    go = threading.Event()

    def counted(data: bytes, name: str, of: TileRules) -> FileTiles:
        begun.append(name)
        assert go.wait(SECONDS)
        return file_tiles(data, name, of)

    monkeypatch.setattr(reader_module, "file_tiles", counted)
    path, copy = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(FILES["PNG"])
    copy.write_bytes(FILES["PNG"])
    reader = ImageReader(MediaConfig(), rules(), FileCache())
    with ThreadPoolExecutor(6) as threads:
        reading = [threads.submit(reader.tiles, source) for source in (path, copy, str(path)) * 2]
        go.set()
        first, *others = [one.result(SECONDS) for one in reading]
    assert reader.tiles(FILES["PNG"])[0] is first[0]
    assert all(tiles[0] is first[0] for tiles in others)
    assert (len(begun), reader.files.decoded, reader.files.hits) == (1, 1, 6)
    # Other bytes under the same name
    path.write_bytes(FILES["JPEG"])
    assert reader.tiles(path)[0].fingerprint != first[0].fingerprint
    assert (len(begun), reader.files.decoded) == (2, 2)


def test_other_rules_are_decoded_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = FileCache()
    several = [
        rules(),
        rules(split=True),
        rules(ImagePolicy.CORRECT),
        rules(max_pixels=10**5),
        TileRules(ImagePolicy.PARITY, 10**6, rules().image_config, 7, 70),
    ]
    for _ in range(2):
        for of in several:
            got = ImageReader(MediaConfig(), of, files).tiles(FILES["alpha"])
            assert_equal_to_rules(got, of)
    assert (files.decoded, files.hits) == (len(several), len(several))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    ImageReader(MediaConfig(), rules(), files).tiles(FILES["alpha"])
    assert files.decoded == len(several) + 1


def assert_equal_to_rules(got: list[Tile], of: TileRules) -> None:
    wanted = file_tiles(FILES["alpha"], "a", of).tiles
    assert [tile.fingerprint for tile in got] == [tile.fingerprint for tile in wanted]


def test_errors_are_not_kept_and_warnings_come_again() -> None:
    reader = ImageReader(
        MediaConfig(image_policy=ImagePolicy.CORRECT), rules(ImagePolicy.CORRECT), FileCache()
    )
    for _ in range(2):
        with pytest.raises(ImageError, match="must be an image file"):
            reader.tiles(b"no image")
    for _ in range(2):
        with pytest.warns(ImageWarning, match="^image bytes: has several frames or pages, only"):
            reader.tiles(frames("GIF"))
    assert (reader.files.decoded, reader.files.hits) == (1, 1)


def test_another_thread_s_error_or_interrupt_is_not_shared() -> None:
    files, inside, go = FileCache(), threading.Event(), threading.Event()

    def interrupted() -> FileTiles:
        inside.set()
        assert go.wait(SECONDS)
        raise KeyboardInterrupt

    def fine() -> FileTiles:
        return file_tiles(FILES["PNG"], "a", rules())

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(files.get, FILES["PNG"], rules(), interrupted)
        assert inside.wait(SECONDS)
        second = threads.submit(files.get, FILES["PNG"], rules(), fine)
        go.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(SECONDS)
        assert second.result(SECONDS).tiles
    files.get(FILES["PNG"], rules(), fine)
    assert (files.decoded, files.hits) == (1, 1)


def test_the_cache_has_a_bound_in_bytes() -> None:
    datas = [file(noise(70, 70 - n), "PNG") for n in range(6)]
    one = file_tiles(datas[0], "a", rules()).num_bytes
    files = FileCache(3 * one)
    reader = ImageReader(MediaConfig(), rules(), files)
    for data in datas:
        reader.tiles(data)
        # The first one is used again and again
        reader.tiles(datas[0])
    assert files.hits == 6
    for data in datas[-2:]:
        reader.tiles(data)
    assert files.hits == 8
    reader.tiles(datas[1])
    assert (files.hits, files.decoded) == (8, 7)
    small = ImageReader(MediaConfig(), rules(), FileCache(one - 1))
    for _ in range(2):
        small.tiles(datas[0])
    assert small.files.decoded == 2
    files.clear()
    reader.tiles(datas[0])
    assert files.decoded == 8
