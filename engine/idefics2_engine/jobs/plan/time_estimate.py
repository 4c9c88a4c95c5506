"""The seconds of a job, from measured rates of a machine.

The device's seconds for the useful work (``device_rates``) are a bound that no job reaches: steps
are padded, launched by a host and not always full. Whole jobs of ``idefics2 bench offline`` say how
much longer a job takes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from idefics2_engine.errors import ConfigError
from idefics2_engine.jobs.plan.device_rates import PEER, Rates, Row, Work, bound_seconds
from idefics2_engine.model_files import open_file, printable_path

_FASTEST, _USUAL, _SLOWEST = "ms_p20", "ms", "ms_p80"


@dataclass(frozen=True)
class Overhead:
    """How much longer a job takes than the device's useful work: at best, usually and at worst."""

    low: float
    usual: float
    high: float


# The recorded jobs of 256 requests took 1.24 times the bound on an H200 and 1.31 on an H100, with 16
# cores each
DEFAULT_OVERHEAD = Overhead(1.05, 1.25, 1.5)


@dataclass(frozen=True)
class TimeEstimate:
    """The seconds of a job, without those in which the model is loaded.

    Attributes:
        seconds: The estimate.
        low: Seconds if all goes well.
        high: Seconds at worst, as long as the host keeps up.
        images: Seconds of the device for images.
        prompts: Seconds of the device for prompts.
        decode: Seconds of the device for decode steps.
        machine: GPU of the rates.
        model: Model of the rates.
        formula: The formula with its rates.
    """

    seconds: float
    low: float
    high: float
    images: float
    prompts: float
    decode: float
    machine: str
    model: str
    formula: str

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MeasuredRates:
    """Rates of a machine with their spread.

    Attributes:
        usual: Rates by the median times.
        fast: Rates by the 20th percentile of the times.
        slow: Rates by the 80th percentile.
        overhead: What a job takes beyond them.
        machine: The GPU.
        model: Name of the model.
    """

    usual: Rates
    fast: Rates
    slow: Rates
    overhead: Overhead
    machine: str
    model: str

    @classmethod
    def load(
        cls, paths: Sequence[Path], patch_size: int, quantization: str | None = None
    ) -> "MeasuredRates":
        """Read result files of ``bench latency`` and ``bench offline`` as one.

        Args:
            paths: The files. Of several rows of a case, the last one counts.
            patch_size: Pixels per side of a patch.
            quantization: That of the model; rows of another one do not count.

        Raises:
            ConfigError: A file cannot be read, or the files lack a kind of row.
        """
        files = [_read(path) for path in paths]
        names = ", ".join(printable_path(path) for path in paths)
        rows = list({_case(row): row for _, of_file in files for row in of_file}.values())
        try:
            usual, fast, slow = (
                Rates.from_rows(
                    [{**row, "ms": row.get(key, row["ms"])} for row in rows if "ms" in row],
                    patch_size,
                    quantization,
                )
                for key in (_USUAL, _FASTEST, _SLOWEST)
            )
            # The rows are in the order of kernels, and any of them names the model
            model = next(str(row["model"]) for row in rows if "model" in row)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ConfigError(
                f"{names}: must have rows of bench latency with images, a prompt and decode steps"
                f"{', quantized' if quantization else ''}, and does not: {error}"
            ) from None
        return cls(usual, fast, slow, _overhead(rows), _machine(files), model)

    def estimate(self, work: Work) -> TimeEstimate:
        """Return the seconds of ``work``."""
        parts = bound_seconds(work, self.usual)
        return TimeEstimate(
            seconds=self.overhead.usual * sum(parts.values()),
            low=self.overhead.low * sum(bound_seconds(work, self.fast).values()),
            high=self.overhead.high * sum(bound_seconds(work, self.slow).values()),
            images=parts["images"],
            prompts=parts["prompts"],
            decode=parts["decode"],
            machine=self.machine,
            model=self.model,
            formula=str(self.usual),
        )


def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    with open_file(path) as (file, size):
        content = file.read(size)
    try:
        found = json.loads(content)
        machine, rows = found["machine"], found["rows"]
        well_formed = isinstance(machine, dict) and all(
            isinstance(row["case"], str) and isinstance(row["impl"], str) for row in rows
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise ConfigError(f"{printable_path(path)}: must be a file that idefics2 bench wrote")
    return machine, rows


def _case(row: Row) -> tuple[str, ...]:
    return row["case"], row["impl"], str(row.get("model")), str(row.get("dtype"))


def _machine(files: Iterable[tuple[dict[str, Any], list[Row]]]) -> str:
    names = [str(machine.get("gpu") or machine.get("cpu")) for machine, _ in files]
    return ", ".join(dict.fromkeys(names))


def _overhead(rows: Iterable[Row]) -> Overhead:
    """Return the overhead of the jobs in ``rows`` that have a bound, if there are any."""
    found = [
        row["device_bound"]["requests_per_second"] / row["requests_per_s"]
        for row in rows
        if "device_bound" in row and not row["impl"].startswith(PEER)
    ]
    if not found:
        return DEFAULT_OVERHEAD
    usual, spread = mean(found), DEFAULT_OVERHEAD.usual
    return Overhead(
        min(*found, usual * DEFAULT_OVERHEAD.low / spread),
        usual,
        max(*found, usual * DEFAULT_OVERHEAD.high / spread),
    )
