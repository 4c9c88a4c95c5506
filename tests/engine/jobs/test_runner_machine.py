"""Any sequence of runs, kills, damage, changed rows and options, failures and retries."""

import json
from pathlib import Path
from zlib import crc32

from hypothesis import settings
from hypothesis.stateful import rule
from hypothesis.strategies import booleans, floats, integers, sampled_from

from idefics2_engine.jobs.job_errors import FingerprintError, JobError
from idefics2_engine.jobs.store.job_folder import job_path
from job_files import CountedFiles, Killed, KilledFiles
from job_machine import MACHINE_SETTINGS, NEVER, JobMachine
from stand_in_job import journalled
from stand_in_run import StandInEngine, expected, is_bad, row_key, run_rows


class RunnerMachine(JobMachine):
    """The same with the runner. Rows that begin with ``fail`` fail while the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.is_failing = False

    def teardown(self) -> None:
        self.is_failing = False
        self.start_run(
            at=NEVER, share=0.0, order=1, mode="force_resume", overwrite=True, retry=True
        )
        assert self.out.read_bytes() == expected(self.rows)
        self.clean_up()

    @rule(kind=sampled_from(["bad", "fail"]))
    def append_row(self, kind: str) -> None:
        self.rows.append(f"{kind} {len(self.rows)}")

    @rule(failing=booleans())
    def fail(self, failing: bool) -> None:
        self.is_failing = failing

    def start(self, **choices: object) -> None:
        """Is not a rule here."""

    @rule(
        at=sampled_from([*range(0, 60, 3), NEVER, NEVER, NEVER]),
        share=floats(0, 1),
        order=integers(0, 9),
        mode=sampled_from(["", "", "", "restart", "force_resume"]),
        overwrite=booleans(),
        retry=booleans(),
    )
    def start_run(
        self, at: int, share: float, order: int, mode: str, overwrite: bool, retry: bool
    ) -> None:
        folder = job_path(self.out)
        is_begun = (folder / "job.json").exists()
        differs = self.differs()
        is_users = self.out.exists() and self.out.read_bytes() in self.users
        known = self.known_rows() if mode != "restart" or not is_begun else set()
        errors = self.error_rows(folder) & known
        failing = [text for text in self.rows if text.startswith("fail") and self.is_failing]
        engine = StandInEngine(order, failures={text: ["image"] for text in failing})
        try:
            result = run_rows(
                self.out,
                self.rows,
                engine,
                parts={"seed": self.seed},
                runner_options={"files": KilledFiles(at, share) if at < NEVER else CountedFiles()},
                in_flight=1 + order % 4,
                window=1 + order,
                overwrite=overwrite,
                restart=mode == "restart",
                force_resume=mode == "force_resume",
                retry_errors=() if retry else None,
            )
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
        good = {number for number, text in enumerate(self.rows) if not is_bad(text)}
        if retry:
            known -= errors
        assert sorted(engine.asked.elements()) == sorted(self.rows[row] for row in good - known)
        failed = {row for row in good - known if self.rows[row] in engine.failures} | (
            errors & known
        )
        wanted = expected(self.rows, {self.rows[row]: "image" for row in failed & good})
        assert self.out.read_bytes() == wanted
        assert not self.partial.exists()
        assert result.exit_code == (3 if b'"error":{' in wanted else 0)

    def known_rows(self) -> set[int]:
        folder = job_path(self.out)
        return journalled(folder, self.rows) if folder.exists() else set()

    def error_rows(self, folder: Path) -> set[int]:
        """Return rows whose newest good line has an error."""
        found: dict[int, bool] = {}
        good = journalled(folder, self.rows) if folder.exists() else set()
        for path in sorted(folder.glob("journal-*")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                if not is_whole(line):
                    continue
                record = json.loads(line)
                row = record["row"]
                if row in good and record["key"] == row_key(self.rows[row]):
                    found[row] = record["out"]["error"] is not None
        return {row for row, is_error in found.items() if is_error}


def is_whole(line: bytes) -> bool:
    body, _, end = line.rpartition(b',"crc":"')
    return end == b'%08x"}' % crc32(body)


test_state_machine = RunnerMachine.TestCase
test_state_machine.settings = settings(MACHINE_SETTINGS, max_examples=25)
