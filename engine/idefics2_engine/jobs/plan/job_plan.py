"""The plan of a job: counts that equal those of the run, its bad rows, and estimates."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from idefics2_engine.jobs.plan.cache_estimate import CacheEstimate
from idefics2_engine.jobs.plan.device_rates import Work
from idefics2_engine.jobs.plan.distribution import Distribution
from idefics2_engine.jobs.plan.kv_estimate import KvEstimate
from idefics2_engine.jobs.plan.row_planner import PlannedRow
from idefics2_engine.jobs.plan.time_estimate import MeasuredRates, TimeEstimate
from idefics2_engine.model.config import TextConfig
from idefics2_engine.runtime.config import PAGE_SIZE, EngineConfig

QUANTITIES = (
    "images",
    "tiles",
    "patches",
    "image_tokens",
    "text_tokens",
    "prompt_tokens",
    "max_new_tokens",
)
"""What is counted of each row that will be answered."""

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a value by the name of its dtype."""

# Examples of each error
_EXAMPLES = 3
# Pages of a cache whose size is measured when the model is loaded: a million tokens
_PAGES = 1 << 14


@dataclass(frozen=True)
class PlanOptions:
    """What the estimates of a plan depend on besides its rows.

    Attributes:
        text: Sizes of the text model.
        engine: Sizes of the runtime. ``kv_cache_tokens`` is 0 if it is measured when the model is
            loaded.
        dtype: Name of the dtype of the KV cache, one of ``DTYPE_BYTES``.
        expected_tokens: Tokens that an answer is expected to have. If ``None``, as many as it may.
    """

    text: TextConfig
    engine: EngineConfig
    dtype: str
    expected_tokens: int | None = None


@dataclass
class Failures:
    """Rows that will fail with one code.

    Attributes:
        rows: How many.
        examples: The first of them: place, id and message.
    """

    rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: PlannedRow) -> None:
        """Count one more row."""
        assert row.error is not None
        self.rows += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(
                {
                    "row": row.number,
                    "id": row.id,
                    "place": row.place,
                    "message": row.error.message,
                }
            )


class JobPlan:
    """Counts of the rows that are added, in order.

    Args:
        options: What the estimates depend on.

    Attributes:
        num_rows: All rows.
        failures: Rows that will fail, by code.
        longest_unfit: Tokens of the longest prompt that does not fit.
        num_unread: Images whose size is not known, which count as the largest ones.
        num_short: Rows whose ``max_tokens`` may cut off an answer that has to satisfy a constraint.
        counts: The distribution of each of ``QUANTITIES`` over the rows that will be answered.
        kv: Pages of the KV cache.
        num_cached: Prompt tokens that the prefix cache will have.
    """

    def __init__(self, options: PlanOptions) -> None:
        engine = options.engine
        self.options = options
        self.num_rows = 0
        self.failures: dict[str, Failures] = {}
        self.longest_unfit = 0
        self.num_unread = 0
        self.num_short = 0
        self.counts = {name: Distribution() for name in QUANTITIES}
        self.kv = KvEstimate(
            engine.max_num_seqs, options.text.sliding_window, engine.max_num_batched_tokens
        )
        self.num_cached = 0
        self._caches = CacheEstimate(
            (engine.num_pages or _PAGES) if engine.prefix_caching else 0, engine.max_cached_images
        )
        # How many tiles to encode have so many patches, and how many answers so many tokens
        self._encoded: Counter[int] = Counter()
        self._answers: Counter[int] = Counter()

    def add(self, row: PlannedRow) -> None:
        """Add the next row."""
        self.num_rows += 1
        if row.error is not None:
            self.failures.setdefault(row.error.code, Failures()).add(row)
            self.longest_unfit = max(self.longest_unfit, row.longest)
            return
        self.num_unread += row.num_unread
        self.num_short += row.is_short
        num_image = row.num_image
        values = (
            row.num_images,
            len(row.tiles),
            row.num_patches,
            num_image,
            row.num_prompt - num_image,
            row.num_prompt,
            row.max_tokens,
        )
        for name, value in zip(QUANTITIES, values, strict=True):
            self.counts[name].add(value)
        cached, tiles = self._caches.add(row)
        self.num_cached += cached
        self._encoded.update([tile.num_patches for tile in tiles])
        expected = min(row.max_tokens, self.options.expected_tokens or row.max_tokens)
        self._answers[expected] += row.num_answers
        held = row.num_prompt - cached
        self.kv.add(row.num_prompt, held, row.max_tokens, expected, row.num_answers)

    @property
    def num_failing(self) -> int:
        """Rows that will fail."""
        return sum(failures.rows for failures in self.failures.values())

    @property
    def work(self) -> Work:
        """The useful work of the device."""
        prompts = self.counts["prompt_tokens"].total - self.num_cached
        return Work(self._encoded, prompts, self._answers, self.options.engine.max_num_seqs)

    def estimate(self, rates: MeasuredRates) -> TimeEstimate:
        """Return the seconds of the job on the machine of ``rates``."""
        return rates.estimate(self.work)

    def to_dict(self, time: TimeEstimate | None = None) -> dict[str, Any]:
        """Return the plan for JSON."""
        engine = self.options.engine
        page_bytes = PAGE_SIZE * self.options.text.kv_values * DTYPE_BYTES[self.options.dtype]
        bound, likely = self.kv.bound, self.kv.likely()
        return {
            "rows": {
                "total": self.num_rows,
                "answered": self.num_rows - self.num_failing,
                "failing": self.num_failing,
            },
            "failures": {
                code: {"rows": failures.rows, "examples": failures.examples}
                for code, failures in sorted(self.failures.items())
            },
            "longest_unfit_prompt": self.longest_unfit or None,
            "max_model_len": engine.max_model_len,
            "counts": {name: counts.to_dict() for name, counts in self.counts.items()},
            "unread_images": self.num_unread,
            "short_max_tokens": self.num_short,
            "cached_prompt_tokens": self.num_cached,
            "encoded": {"tiles": self._encoded.total(), "patches": self.work.patches},
            "kv_cache": {
                "dtype": self.options.dtype,
                "page_tokens": PAGE_SIZE,
                "page_bytes": page_bytes,
                "max_num_seqs": engine.max_num_seqs,
                "pages_per_sequence": self.kv.pages.to_dict(),
                "peak_pages": {"likely": likely, "bound": bound},
                "peak_bytes": {"likely": likely * page_bytes, "bound": bound * page_bytes},
                "pages": engine.num_pages or None,
            },
            "time": None if time is None else time.to_dict(),
        }


def plan_job(rows: Iterable[PlannedRow], options: PlanOptions) -> JobPlan:
    """Return the plan of a job with ``rows``, which are read once."""
    plan = JobPlan(options)
    for row in rows:
        plan.add(row)
    return plan
