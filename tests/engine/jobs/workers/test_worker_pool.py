"""Workers give what one engine gives, whatever ends them, and end with their parent."""

import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any, cast

import pytest

from idefics2_engine.errors import ConfigError, PromptError, WorkerLostError
from idefics2_engine.jobs.row_engine import RowEngine
from idefics2_engine.jobs.workers import worker_processes
from idefics2_engine.jobs.workers.engine_spec import EngineSpec
from idefics2_engine.jobs.workers.messages import (
    Answered,
    FromWorker,
    Ready,
    Rows,
    ToWorker,
    WorkerMetrics,
)
from idefics2_engine.jobs.workers.worker_place import WorkerPlace
from idefics2_engine.jobs.workers.worker_pool import WorkerPool
from idefics2_engine.jobs.workers.worker_process import Put, WorkerProcess
from idefics2_engine.jobs.workers.worker_processes import WorkerPoolError
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row
from stand_in_engine import NAME, Meeting, answer, content

# Nothing here takes that long; a test that would wait for ever fails after it
SECONDS = 60.0


def pool_of(count: int, **arguments: Any) -> WorkerPool:
    return WorkerPool(EngineSpec(arguments, NAME), count)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with pool_of(2) as made:
        yield made


def rows(count: int, **orders: list[int]) -> list[Row]:
    by_number = {number: order for order, numbers in orders.items() for number in numbers}
    return [
        Row(f"row {number}", {"prompt": f"{number}?", "order": by_number.get(number)})
        for number in range(count)
    ]


def expected(all_rows: list[Row]) -> list[tuple[Any, ...]]:
    return [content(answer(row, place)) for place, row in enumerate(all_rows)]


def in_order(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [content(one) for one in sorted(outputs, key=lambda one: int(one.request_id))]


def worker_of(output: RequestOutput) -> int:
    assert isinstance(output.metrics, WorkerMetrics)
    return output.metrics.worker


def wait_for_end(pid: int) -> None:
    """Wait for the end of a process that need not be a child; it may have ended."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], SECONDS)[0], f"process {pid} runs"
        finally:
            os.close(fd)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_outputs(count: int, tmp_path: Path) -> None:
    with pool_of(count, meets=Meeting(tmp_path, count).path) as made:
        engine: RowEngine = made
        outputs = list(engine.iterate(rows(60, error=[7])))
    wanted = expected(rows(60, error=[7]))
    wanted[7] = ("row 7", "7", "", [], ("prompt", "prompt must be good, got bad"))
    assert in_order(outputs) == wanted
    assert {worker_of(one) for one in outputs} == set(range(count))


def test_processes_stay_for_later_rows(pool: WorkerPool) -> None:
    assert in_order(list(pool.iterate(rows(9)))) == expected(rows(9))
    pids = pool.pids
    assert in_order(list(pool.iterate(rows(20), in_flight=1))) == expected(rows(20))
    assert pool.pids == pids
    assert list(pool.iterate([])) == []


def test_no_process_starts_without_a_row() -> None:
    with pool_of(2) as made:
        assert list(made.iterate([])) == []
        assert made.pids == []


def test_killed_workers_cost_no_row() -> None:
    """Ten kills. A row that was in flight at one of them is answered before the next one."""
    rng = random.Random(0)
    outputs: list[RequestOutput] = []
    kills = deaths = 0
    all_rows: list[Row] = []

    def source() -> Iterator[Row]:
        """Yield rows until the last death was noticed."""
        while deaths < 10:
            all_rows.append(Row(len(all_rows), f"{len(all_rows)}?"))
            yield all_rows[-1]

    with pool_of(2) as made:
        open_rows: set[str] = set()
        more = 5
        for output in made.iterate(source()):
            outputs.append(output)
            open_rows.discard(output.request_id)
            if deaths < made.num_deaths:
                deaths, more = made.num_deaths, rng.randrange(20)
                read = set(map(str, range(len(all_rows))))
                open_rows = read - {one.request_id for one in outputs}
            if kills == deaths < 10 and not open_rows:
                more -= 1
                if more < 0:
                    os.kill(rng.choice(made.pids), signal.SIGKILL)
                    kills += 1
        assert kills == made.num_deaths == 10
    assert in_order(outputs) == expected(all_rows)


def test_any_kills_leave_one_output_for_every_row() -> None:
    """Kills that are not the rows' fault may hit a row that runs alone, which is lost then."""
    rng = random.Random(0)
    all_rows = rows(300)
    outputs: list[RequestOutput] = []
    with pool_of(2) as made:
        for output in made.iterate(all_rows):
            outputs.append(output)
            if len(outputs) % 15 == 0 and made.pids:
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(made.pids), signal.SIGKILL)
    for got, wanted in zip(in_order(outputs), expected(all_rows), strict=True):
        assert got == wanted or (got[:2] == wanted[:2] and got[4][0] == "worker_lost")


@pytest.mark.parametrize("count", [1, 2])
def test_row_that_kills_its_worker_is_lost_and_no_other(count: int) -> None:
    poison = [0, 9, 10, 39]
    all_rows = rows(40, kill=poison)
    with pool_of(count) as made:
        outputs = list(made.iterate(all_rows))
        assert made.num_deaths >= len(poison)
    got = in_order(outputs)
    lost = [(one.key, one.request_id) for one in outputs if isinstance(one.error, WorkerLostError)]
    assert sorted(lost) == sorted((f"row {number}", str(number)) for number in poison)
    messages = {str(one.error) for one in outputs if one.error is not None}
    assert messages == {
        "the process of the worker ended each time this row ran, the last time alone"
    }
    for number, wanted in enumerate(expected(all_rows)):
        assert number in poison or got[number] == wanted


def test_exception_of_an_engine_is_a_death(caplog: pytest.LogCaptureFixture) -> None:
    with pool_of(1) as made:
        (output,) = made.iterate(rows(1, **{"raise": [0]}))
    assert isinstance(output.error, WorkerLostError)
    assert "worker 0: RuntimeError: the engine is broken" in caplog.messages
    assert caplog.messages.count("worker 0 ended with exit code 1") == 3


def test_workers_that_never_live_are_an_error_with_their_last_words() -> None:
    with pool_of(2, fails="kill") as made:
        with pytest.raises(WorkerPoolError, match="ended again and again") as raised:
            list(made.iterate(rows(5)))
        assert "with signal 9; it wrote last:\nthe last words" in str(raised.value)
        assert 6 <= made.num_deaths < 20
        assert made.pids == []


def test_rows_that_all_kill_end_the_job() -> None:
    with pool_of(1) as made, pytest.raises(WorkerPoolError, match="again and again"):
        list(made.iterate(rows(40, kill=list(range(40)))))
    assert made.num_deaths < 20


def test_errors_of_building_are_raised_once_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with pool_of(2, fails="config") as made:
        with pytest.raises(ConfigError, match=r"^model must be a folder, got 'nowhere'$"):
            list(made.iterate(rows(5)))
        assert made.pids == []
    with pool_of(1, fails="memory") as made:
        wanted = "^worker 0 cannot build its engine: MemoryError: no room for the weights$"
        with pytest.raises(WorkerPoolError, match=wanted):
            list(made.iterate(rows(5)))
        assert made.num_deaths == 0


def test_process_that_cannot_be_started_is_no_error_of_the_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pool_of(2) as made, pytest.raises(WorkerPoolError, match="worker 0 cannot be started"):
        list(made.iterate(rows(3)))


def test_logs_have_the_number_of_the_worker(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "idefics2_engine")
    with pool_of(2, says="two\nlines", meets=Meeting(tmp_path, 2).path) as made:
        list(made.iterate(rows(20)))
    records = {(one.name, one.levelno, one.getMessage()) for one in caplog.records}
    for worker in range(2):
        said = ("idefics2_engine.stand_in", logging.INFO, f"worker {worker}: two\nlines")
        assert said in records
        warned = f"worker {worker}: ImageWarning: warned two\nlines"
        assert ("idefics2_engine", logging.WARNING, warned) in records
        module = "idefics2_engine.jobs.workers.worker_process"
        assert (module, logging.WARNING, f"worker {worker}: printed two") in records


def test_worker_has_its_environment_and_no_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    with WorkerPool(EngineSpec({"meets": Meeting(tmp_path, 2).path}, NAME)) as made:
        assert made.num_workers == 2
        all_rows = rows(300, process=list(range(300)))
        outputs = list(made.iterate(all_rows, max_prepared_bytes=10**6 + 1))
    assert {worker_of(one) for one in outputs} == {0, 1}
    for one in outputs:
        got = json.loads(one.prompt)
        environment = got["environment"]
        assert environment["CUDA_VISIBLE_DEVICES"] == ["GPU-a", "5"][worker_of(one)]
        assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"
        # Neither torch nor the caller's main module
        assert (got["has_torch"], got["main"]) == (False, None)
        assert (got["in_flight"], got["max_prepared_bytes"]) == (512, 500_000)


def test_rows_are_read_as_they_are_needed(pool: WorkerPool) -> None:
    read = 0

    def source() -> Iterator[Row]:
        nonlocal read
        for row in rows(50):
            read += 1
            yield row

    for yielded, _ in enumerate(pool.iterate(source(), in_flight=5)):
        assert read <= yielded + 1 + 5
    assert read == 50


def test_drain_answers_what_was_read(pool: WorkerPool) -> None:
    waits, end = Event(), Event()

    def source() -> Iterator[Row]:
        yield from rows(6)
        waits.set()
        end.wait(SECONDS)
        yield Row("late", "x")

    outputs = pool.iterate(source())
    got = [next(outputs)]
    assert waits.wait(SECONDS)
    outputs.drain()
    got += outputs
    assert in_order(got) == expected(rows(6))
    end.set()
    # A row that came later is in no other iterator
    assert in_order(list(pool.iterate(rows(6)))) == expected(rows(6))


def test_close_cancels_rows_and_the_pool_goes_on() -> None:
    with pool_of(2) as made:
        outputs = made.iterate(rows(1000))
        list(islice(outputs, 3))
        outputs.close()
        outputs.close()
        assert list(outputs) == []
        assert in_order(list(made.iterate(rows(30)))) == expected(rows(30))
        # They were not found dead
        assert made.num_deaths == 0


def test_interrupt_cancels_rows_and_the_pool_goes_on(pool: WorkerPool) -> None:
    end = Event()

    def source() -> Iterator[Row]:
        yield from rows(6)
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        end.wait(SECONDS)

    outputs = pool.iterate(source())
    with pytest.raises(KeyboardInterrupt):
        list(outputs)
    end.set()
    assert list(outputs) == []
    assert in_order(list(pool.iterate(rows(30)))) == expected(rows(30))


def test_error_of_the_source_comes_after_the_answers(pool: WorkerPool) -> None:
    def source() -> Iterator[Row]:
        yield from rows(6)
        raise OSError("the disk is gone")

    outputs = pool.iterate(source())
    got = list(islice(outputs, 6))
    with pytest.raises(OSError, match="the disk is gone"):
        next(outputs)
    assert in_order(got) == expected(rows(6))


def test_row_that_cannot_be_sent_is_an_error_of_its_own(pool: WorkerPool) -> None:
    bad = Row("bad", {"prompt": lambda: None})
    outputs = list(pool.iterate([*rows(4), bad]))
    assert in_order(outputs)[:4] == expected(rows(4))
    (error,) = [one.error for one in outputs if one.key == "bad"]
    assert isinstance(error, PromptError)


def test_worker_that_never_lives_is_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GPU is broken, and that of the other worker is not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9")
    with WorkerPool(EngineSpec({"fails": "kill on 9"}, NAME)) as made:

        def source() -> Iterator[Row]:
            number = 0
            while made.num_deaths < 3 or number < 300:
                yield Row(number, "x")
                number += 1

        outputs = list(made.iterate(source()))
        assert made.num_deaths == 3
        assert len(made.pids) == 1
    assert {worker_of(one) for one in outputs} == {0}
    assert caplog.messages[-1] == "worker 1 ended with signal 9, and is not started again"


def test_engines_on_one_gpu_are_built_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measures the memory that those before it left."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    class StandInProcess:
        place: WorkerPlace
        is_ready: bool

        def __init__(self, spec: EngineSpec, place: WorkerPlace, put: Put) -> None:
            assert all(one.is_ready for one in processes if one.place.device == place.device)
            self.place, self.put, self.is_ready = place, put, False
            processes.append(self)
            self.reply(Ready())

        def reply(self, message: FromWorker) -> None:
            self.put(cast(WorkerProcess, self), message)

        def send(self, message: ToWorker) -> None:
            for number, _ in message.rows if isinstance(message, Rows) else []:
                self.reply(Answered([answer(Row(number, "x"), number)]))

        def kill(self) -> None:
            pass

    processes: list[StandInProcess] = []
    monkeypatch.setattr(worker_processes, "WorkerProcess", StandInProcess)
    with pool_of(5) as made:

        def source() -> Iterator[Row]:
            number = 0
            while len(processes) < 5:
                yield Row(number, "x")
                number += 1

        list(made.iterate(source()))
    assert sorted(one.place.device or "" for one in processes) == ["0", "0", "0", "1", "1"]


def test_close_ends_an_iterator_that_waits(pool: WorkerPool) -> None:
    waits, end = Event(), Event()

    def source() -> Iterator[Row]:
        yield Row("a", "x")
        waits.set()
        end.wait(SECONDS)

    with pool_of(1) as made:
        outputs = made.iterate(source())
        next(outputs)
        assert waits.wait(SECONDS)
        closing = Thread(target=made.close)
        closing.start()
        with pytest.raises(RuntimeError, match="the workers were closed"):
            next(outputs)
        closing.join()
    end.set()


def test_wrong_use_is_refused(pool: WorkerPool) -> None:
    outputs = pool.iterate(rows(9))
    next(outputs)
    with pytest.raises(RuntimeError, match="not finished"):
        next(pool.iterate(rows(9)))
    assert len(list(outputs)) == 8
    for bad in ({"in_flight": 0}, {"max_prepared_bytes": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            pool.iterate(rows(9), **bad)
    closed = pool_of(1)
    closed.close()
    with pytest.raises(RuntimeError, match="were closed"):
        closed.iterate(rows(1))


def test_interrupts_are_for_the_parent(pool: WorkerPool) -> None:
    outputs = pool.iterate(rows(40))
    got = [next(outputs)]
    for pid in pool.pids:
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    before = pool.num_deaths
    got += outputs
    assert in_order(got) == expected(rows(40))
    assert pool.num_deaths == before


def test_close_ends_the_processes(tmp_path: Path) -> None:
    made = pool_of(2, meets=Meeting(tmp_path, 2).path)
    list(made.iterate(rows(20)))
    pids = made.pids
    assert len(pids) == 2
    made.close()
    made.close()
    for pid in pids:
        wait_for_end(pid)


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from stand_in_engine import NAME, Row\n"
        "from idefics2_engine.jobs.workers.engine_spec import EngineSpec\n"
        "from idefics2_engine.jobs.workers.worker_pool import WorkerPool\n"
        "pool = WorkerPool(EngineSpec({}, NAME), 2)\n"
        "outputs = pool.iterate(Row(number, 'x') for number in range(10**9))\n"
        "while len(pool.pids) < 2: next(outputs)\n"
        "assert 'torch' not in sys.modules\n"
        "print(*pool.pids, flush=True)\n"
        "for output in outputs: pass\n"
    )
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parents[3] / "helpers")])
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    for pid in pids:
        wait_for_end(pid)


@pytest.mark.long
def test_demo_model_gives_the_same_answers_on_two_workers_of_which_one_is_killed() -> None:
    from idefics2_engine import LLM, SamplingParams
    from idefics2_engine.demo import DEMO_IMAGES

    pictures = sorted(str(path) for path in DEMO_IMAGES.glob("*.png"))

    def questions() -> list[Row]:
        return [
            Row(
                f"question {number}",
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": pictures[number % len(pictures)]},
                            {"type": "text", "text": f"What is in place {number}?"},
                        ],
                    }
                ],
                SamplingParams(temperature=0.7, max_tokens=12),
            )
            for number in range(40)
        ]

    arguments: dict[str, Any] = {"device": "cpu", "max_num_seqs": 4, "seed": 3}
    with LLM(**arguments) as llm:
        wanted = in_order(list(llm.iterate(questions())))
    with WorkerPool(EngineSpec(arguments), 2) as made:
        outputs = made.iterate(questions())
        got = list(islice(outputs, 5))
        os.kill(made.pids[0], signal.SIGKILL)
        got += outputs
        assert made.num_deaths == 1
    assert in_order(got) == wanted
    assert not [one.error for one in got if one.error]
