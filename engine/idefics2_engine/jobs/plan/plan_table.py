"""A plan as text for people."""

from collections.abc import Iterator, Mapping
from typing import Any

_COLUMNS = ("total", "min", "median", "p95", "max")
_SHOWN = 100


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan, given what ``JobPlan.to_dict`` returns and ``repeated_ids``."""
    rows = plan["rows"]
    yield f"rows: {rows['total']:,}, of which {rows['failing']:,} will fail"
    if rows["answered"]:
        yield ""
        yield f"{'of each row':16}" + "".join(f"{name:>14}" for name in _COLUMNS)
        for name, counts in plan["counts"].items():
            yield _counts_line(name.replace("_", " "), counts)
    yield from _failure_lines(plan)
    repeated = plan["repeated_ids"]
    if repeated["rows"]:
        yield ""
        yield f"repeated ids: {_rows(repeated['rows'])} that a run refuses, such as"
        for example in repeated["examples"]:
            yield f"  {example['id']!r}: {example['first']} and {example['second']}"
    if rows["answered"]:
        yield ""
        yield from _cache_lines(plan)
    if plan["time"] is not None:
        yield ""
        yield from _time_lines(plan["time"])


def _counts_line(name: str, counts: Mapping[str, int]) -> str:
    return f"{name:16}" + "".join(f"{counts[column]:14,}" for column in _COLUMNS)


def _failure_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    for code, failures in plan["failures"].items():
        yield ""
        yield f"{code}: {_rows(failures['rows'])}, such as"
        for example in failures["examples"]:
            yield f"  {example['place']}: {_shortened(example['message'])}"
    if plan["longest_unfit_prompt"] is not None:
        yield (
            f"  the longest prompt has {plan['longest_unfit_prompt']:,} tokens, and must leave room "
            f"for an answer within {plan['max_model_len']:,}"
        )


def _cache_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    if plan["unread_images"]:
        yield (
            f"images whose size was not read, and which count as the largest ones: "
            f"{plan['unread_images']:,}"
        )
    if plan["short_max_tokens"]:
        yield (
            "rows whose max_tokens are fewer than a short answer has that satisfies "
            f"structured_outputs: {plan['short_max_tokens']:,}"
        )
    prompts, patches = (plan["counts"][name]["total"] for name in ("prompt_tokens", "patches"))
    encoded = plan["encoded"]["patches"]
    yield (
        f"from caches, in the order of the input: {plan['cached_prompt_tokens']:,} of "
        f"{prompts:,} prompt tokens, {patches - encoded:,} of {patches:,} patches"
    )
    kv = plan["kv_cache"]
    pages, size = kv["peak_pages"], kv["peak_bytes"]
    yield (
        f"KV cache with {kv['max_num_seqs']:,} sequences at once: likely {pages['likely']:,} pages "
        f"({_gigabytes(size['likely'])}), at most {pages['bound']:,} ({_gigabytes(size['bound'])}), "
        f"of {kv['page_tokens']} tokens in {kv['dtype']}"
    )
    if kv["pages"] is not None and kv["pages"] < pages["bound"]:
        yield f"  it has {kv['pages']:,} pages, so sequences may wait for each other"


def _time_lines(time: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"time: {_duration(time['seconds'])}, from {_duration(time['low'])} to "
        f"{_duration(time['high'])}, on {time['machine']} with {time['model']}"
    )
    parts = ", ".join(f"{name} {_duration(time[name])}" for name in ("images", "prompts", "decode"))
    yield f"  of the device at full speed: {parts}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
