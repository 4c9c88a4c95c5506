"""Time decode steps of constrained answers beside free ones: ``idefics2 bench structured``.

    idefics2 bench structured  # the demo checkpoint
    idefics2 bench structured --random-weights tests/data/idefics2-8b --json h200-structured.json

All sequences of a case have one constraint, a JSON schema of twelve keys, or none. A step's time is
the mean of those after all prompts and before the first answer ends, in the engine as ``LLM``
drives it. Tokens that the constraint forces are drawn one by one there, so that both kinds take
equally many steps. Kinds alternate, and times are medians of ``--rounds``.

The rows ``forced-*`` are whole answers, with forced tokens appended at once: how many tokens a
sequence gets in a forward pass, and the time beside the same answers without that.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

from idefics2_bench import model_suite
from idefics2_bench.offline import Results
from idefics2_bench.timing import summary
from idefics2_engine import LLM, SamplingParams, StructuredOutputsParams
from idefics2_engine.scheduling import sequence

Row = dict[str, Any]

FREE, CONSTRAINED = "free", "constrained"
_PROMPT_TOKENS = 16
# The shortest answer has more
_STEPS = 64
# A step with a prompt, and those in which the host runs ahead for the first time
_FIRST_STEPS = 8
_MOST_TOKENS = 512

_LEVELS: Row = {"enum": ["low", "medium", "high"]}
_NUMBER: Row = {"type": "integer", "minimum": 0, "maximum": 999}
_FLAG: Row = {"type": "boolean"}
SCHEMA: Row = {
    "type": "object",
    "properties": {
        "image_quality": _LEVELS,
        "number_of_objects": _NUMBER,
        "has_text": _FLAG,
        "main_color_temperature": {"enum": ["cold", "neutral", "warm"]},
        "number_of_people": _NUMBER,
        "is_outdoors": _FLAG,
        "level_of_detail": _LEVELS,
        "estimated_year": _NUMBER,
        "is_photograph": _FLAG,
        "amount_of_motion": _LEVELS,
        "number_of_colors": _NUMBER,
        "needs_review": _FLAG,
    },
    "additionalProperties": False,
}
SCHEMA["required"] = [*SCHEMA["properties"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    for name, least in (("rounds", options.rounds), ("batch", min(options.batch))):
        if least < 1:
            parser.error(f"--{name} must be at least 1, got {least}")
    results = Results(options.json, model_suite.about(options))
    most = max(options.batch)
    llm = model_suite.load(
        options,
        max_model_len=_PROMPT_TOKENS + _MOST_TOKENS,
        max_num_seqs=most,
        kv_cache_tokens=most * (_PROMPT_TOKENS + _MOST_TOKENS),
        enable_prefix_caching=False,
    )
    settings = model_suite.settings_of(llm, options)
    for batch in options.batch:
        rows = [*step_rows(llm, batch, options.rounds), forced_row(llm, batch)]
        for row in rows:
            results.add({"kernel": "structured", "batch": batch, **row, **settings})
    llm.close()
    results.print_table(options)
    return 0


def step_rows(llm: LLM, batch: int, rounds: int) -> list[Row]:
    """Time decode steps of ``batch`` sequences, free and constrained."""
    samples: dict[str, list[float]] = {FREE: [], CONSTRAINED: []}
    with _one_by_one():
        for turn in range(-1, rounds):
            for kind, times in samples.items():
                with _step_ends(llm) as ends:
                    _answer(llm, batch, _params(kind, _STEPS))
                if len(ends) < _STEPS:
                    raise RuntimeError(f"{_STEPS} steps must be timed, got {len(ends)}")
                # The first round compiles the constraint
                if turn >= 0:
                    first, last = ends[_FIRST_STEPS], ends[_STEPS - 2]
                    times.append(1e3 * (last - first) / (_STEPS - 2 - _FIRST_STEPS))
    rows = [
        {"case": f"steps-b{batch}", "impl": kind, **asdict(summary(times))}
        for kind, times in samples.items()
    ]
    free, constrained = rows
    constrained |= {"peer": FREE, "peer_ms": free["ms"], "speedup": free["ms"] / constrained["ms"]}
    return rows


def forced_row(llm: LLM, batch: int) -> Row:
    """Answer ``batch`` prompts whole, with forced tokens at once and then one by one."""
    params = _params(CONSTRAINED, _MOST_TOKENS)
    seconds = []
    stats = []
    for forced in (nullcontext(), _one_by_one()):
        with forced:
            before = replace(llm.stats)
            begin = time.perf_counter()
            _answer(llm, batch, params)
            seconds.append(time.perf_counter() - begin)
            after = replace(llm.stats)
        tokens = after.generated_tokens - before.generated_tokens
        stats.append(
            (tokens, after.steps - before.steps, after.forced_tokens - before.forced_tokens)
        )
    (tokens, passes, forced_tokens), (_, passes_one_by_one, _) = stats
    return {
        "case": f"forced-b{batch}",
        "impl": CONSTRAINED,
        "ms": 1e3 * seconds[0],
        "ms_one_by_one": 1e3 * seconds[1],
        "forward_passes": passes,
        "forward_passes_one_by_one": passes_one_by_one,
        "tokens_per_pass": tokens / batch / passes,
        "forced_share": forced_tokens / tokens,
    }


def _params(kind: str, tokens: int) -> SamplingParams:
    if kind == FREE:
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    constraint = StructuredOutputsParams(json=SCHEMA)
    return SamplingParams(temperature=0.0, max_tokens=tokens, structured_outputs=constraint)


def _answer(llm: LLM, batch: int, params: SamplingParams) -> None:
    """Answer ``batch`` prompts, each with other tokens."""
    last = llm.config.text.vocab_size // 2
    prompts = [
        {"prompt_token_ids": [1, *((place + i) % last + 5 for i in range(_PROMPT_TOKENS - 1))]}
        for place in range(batch)
    ]
    for output in llm.generate(prompts, params):
        if output.error is not None:
            raise RuntimeError("every answer must be given") from output.error


@contextmanager
def _step_ends(llm: LLM) -> Iterator[list[float]]:
    """Yield a list to which each step of the engine appends its end, in seconds."""
    ends: list[float] = []
    step = llm.engine.step

    def timed(*arguments: Any, **named: Any) -> Any:
        done = step(*arguments, **named)
        ends.append(time.perf_counter())
        return done

    with patch.object(llm.engine, "step", timed):
        yield ends


def _one_by_one() -> Any:
    """Return a context in which no forced token is appended."""
    return patch.object(sequence.Sequence, "append_forced", lambda _sequence: 0)


def _parser() -> argparse.ArgumentParser:
    parser = model_suite.parser("structured", __doc__, has_peer=False)
    add = parser.add_argument
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 32, 128],
        help="sequences of each case (default: 1 32 128)",
    )
    add("--rounds", type=int, default=5, help="timed rounds of steps (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
