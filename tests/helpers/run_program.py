"""A program that runs jobs of the stand-in in forks that are killed, or measures their memory."""

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from job_files import SignalledFiles
from stand_in_job import num_lines
from stand_in_run import StandInEngine, expected, is_bad, run_rows


def kill_many(root: Path, kills: int, num_rows: int) -> None:
    """Kill forks that run one job until ``kills`` of them are dead; start again when it is done."""
    rng = random.Random(0)
    # One row in 20 is bad
    texts = [f"{'bad' if n % 20 == 7 else 'row'} {n}" for n in range(num_rows)]
    wanted = expected(texts)
    in_flight = 8
    dead = jobs = killed_here = 0
    while dead < kills:
        out, log = root / f"{jobs}.jsonl", root / f"{jobs}.asked"
        child = os.fork()
        if not child:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            engine = StandInEngine(dead, on_row=partial(log_row, fd))
            files = SignalledFiles(rng.randrange(5, 2 * num_rows // 20), rng.random())
            result = run_rows(
                out, texts, engine, in_flight=in_flight, runner_options={"files": files}
            )
            os._exit(result.exit_code)
        # Every child draws other numbers
        rng.random()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            dead += 1
            killed_here += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 3
        assert out.read_bytes() == wanted
        # A row that was journalled was not computed again
        folder = root / f"{jobs}.jsonl.job"
        assert num_lines(folder) == num_rows
        num_asked = log.read_bytes().count(b"\n")
        num_good = sum(not is_bad(text) for text in texts)
        assert num_good <= num_asked <= num_good + in_flight * killed_here
        jobs, killed_here = jobs + 1, 0
    print(json.dumps({"dead": dead, "jobs": jobs, "torch": "torch" in sys.modules}))


def log_row(fd: int, text: str) -> None:
    os.write(fd, f"{text}\n".encode())


def measure_memory(root: Path, num_rows: int) -> None:
    """Run a job whose first row is answered last, and print how much memory it takes."""
    begin = most = 0

    def measure(number: int) -> None:
        nonlocal begin, most
        if number % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            begin = begin if number > 1000 else pages
            most = max(most, pages)

    engine = StandInEngine(held={"row 0": num_rows - 1}, on_answer=measure)
    # The stand-in's own table would grow
    engine.asked = Forgetful()
    texts = Lazy(num_rows)
    result = run_rows(root / "out.jsonl", texts, engine, in_flight=16, window=num_rows)
    grown = (most - begin) * os.sysconf("SC_PAGE_SIZE")
    print(json.dumps({"rows": result.counts.rows, "grown": grown, "torch": "torch" in sys.modules}))


class Forgetful(Counter[str]):
    def __setitem__(self, key: str, value: int) -> None:
        """Keep nothing."""


class Lazy:
    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[str]:
        return (f"row {number}" for number in range(self.num_rows))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_many(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        measure_memory(Path(sys.argv[2]), int(sys.argv[3]))
