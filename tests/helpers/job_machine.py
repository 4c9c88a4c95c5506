"""A state machine of starts, kills, damage and changes: rows, order, and files of the user."""

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import booleans, floats, integers, sampled_from

from idefics2_engine.jobs.job_errors import FingerprintError, JobError
from idefics2_engine.jobs.store.job_description import read_description
from idefics2_engine.jobs.store.job_folder import job_path
from job_files import CountedFiles, Killed, KilledFiles
from stand_in_job import expected, journalled, run_job

NEVER = 10**9


class JobMachine(RuleBasedStateMachine):
    """A folder with one job, whose input and options change, and in which a user writes files."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.out = self.root / "out.jsonl"
        self.partial = self.root / "out.jsonl.partial"
        self.rows = ["first"]
        self.seed = 0
        self.changes = 0
        self.users: list[bytes] = []
        self.lines: set[bytes] = set()

    def teardown(self) -> None:
        self.start(at=NEVER, share=0.0, order=0, mode="force_resume", overwrite=True)
        assert self.out.read_bytes() == expected(self.rows)
        self.clean_up()

    def clean_up(self) -> None:
        self.users_files_are_somewhere()
        shutil.rmtree(self.root)

    @rule(number=integers(1, 4))
    def append_rows(self, number: int) -> None:
        self.rows += [f"row {len(self.rows) + index}" for index in range(number)]

    @rule(place=integers(0, 99))
    def change_row(self, place: int) -> None:
        self.changes += 1
        self.rows[place % len(self.rows)] = f"change {self.changes}"

    @rule(seed=integers(0, 1))
    def change_option(self, seed: int) -> None:
        self.seed = seed

    @rule(name=sampled_from(["out.jsonl", "out.jsonl.job.1", "out.jsonl.1"]))
    def write_file(self, name: str) -> None:
        path = self.root / name
        if path.exists():
            if path != self.out:
                return
            # What the user replaces is the user's to destroy
            self.users = [content for content in self.users if content != path.read_bytes()]
            path.unlink()
        self.changes += 1
        self.users.append(b"user %d" % self.changes)
        path.write_bytes(self.users[-1])

    @rule(num_bytes=integers(1, 400))
    def tear(self, num_bytes: int) -> None:
        if segments := sorted(job_path(self.out).glob("journal-*")):
            content = segments[-1].read_bytes()
            segments[-1].write_bytes(content[: max(0, len(content) - num_bytes)])
            self.lines.clear()

    @rule(seed=integers(0, 10**6))
    def flip(self, seed: int) -> None:
        rng = random.Random(seed)
        if segments := sorted(job_path(self.out).glob("journal-*")):
            path = rng.choice(segments)
            if content := bytearray(path.read_bytes()):
                # Not a newline, so that the test can read lines
                places = [place for place, byte in enumerate(content) if byte != 10]
                if places:
                    content[rng.choice(places)] = ord("~")
                    path.write_bytes(content)
                    self.lines.clear()

    @rule(
        at=sampled_from([*range(0, 60, 3), NEVER, NEVER, NEVER]),
        share=floats(0, 1),
        order=integers(0, 9),
        mode=sampled_from(["", "", "", "restart", "force_resume"]),
        overwrite=booleans(),
    )
    def start(self, at: int, share: float, order: int, mode: str, overwrite: bool) -> None:
        folder = job_path(self.out)
        is_begun = (folder / "job.json").exists()
        differs = self.differs()
        known = self.known_rows()
        is_users = self.out.exists() and self.out.read_bytes() in self.users
        choices: dict[str, Any] = {"overwrite": overwrite} | ({mode: True} if mode else {})
        files = KilledFiles(at, share) if at < NEVER else CountedFiles()
        try:
            computed = self.run(files, order, choices)
        except Killed:
            return
        except FingerprintError:
            assert differs
            assert not mode
            return
        except JobError:
            assert is_users
            assert not overwrite
            return
        assert not differs or mode
        assert not is_users or overwrite
        assert self.out.read_bytes() == expected(self.rows)
        assert not self.partial.exists()
        wanted = set(range(len(self.rows)))
        assert sorted(computed) == sorted(
            wanted if mode == "restart" and is_begun else wanted - known
        )

    @invariant()
    def users_files_are_somewhere(self) -> None:
        for content in self.users:
            assert self.is_somewhere(content), content

    @invariant()
    def journal_lines_stay(self) -> None:
        """Whole lines that were not damaged by the machine are never changed."""
        found = {
            line
            for path in self.root.glob("out.jsonl.job*/journal-*")
            for line in path.read_bytes().split(b"\n")[:-1]
        }
        assert self.lines <= found
        self.lines = found

    def run(self, files: CountedFiles, order: int, choices: dict[str, Any]) -> list[int]:
        """Run the job; return the rows that were computed."""
        parts = {"seed": self.seed}
        return run_job(
            self.out, self.rows, files=files, parts=parts, seed=order, window=order, **choices
        )

    def differs(self) -> bool:
        """Return whether the job has rows or an output of another seed."""
        folder = job_path(self.out)
        has_rows = any(path.stat().st_size for path in folder.glob("journal-*"))
        return (
            (has_rows or (folder / "outputs.json").exists())
            and (folder / "job.json").exists()
            and read_description(folder).parts != {"seed": self.seed}
        )

    def is_somewhere(self, content: bytes) -> bool:
        return any(path.is_file() and path.read_bytes() == content for path in self.root.iterdir())

    def known_rows(self) -> set[int]:
        folder = job_path(self.out)
        return journalled(folder, self.rows) if folder.exists() else set()


MACHINE_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
